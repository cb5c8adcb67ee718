"""Recording on GPUs: the same workers as tests/distributed/test_profile_ranks.py, with NCCL."""

from pathlib import Path

import msgspec
import pytest
import torch

from shardwise.core.decomposition import decompose
from shardwise.launch import run_ranks
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks, trace_files
from tests.distributed.profile_workers import SLEEP_S, STEPS, Job

GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS < 2, reason=f"2 ranks on NCCL need 2 GPUs; this machine has {GPUS}")
def test_a_late_rank_is_blamed_on_nccl_and_kernels_are_in_the_steps(tmp_path: Path) -> None:
    job = msgspec.json.encode(Job(str(tmp_path), [1, 0, 1]))
    run_ranks(
        "tests.distributed.profile_workers:record", job, world_size=2, device_type="cuda", timeout_s=300
    )
    timelines, sharing = share(read_ranks(trace_files(tmp_path)))
    assert all(any(lane.is_device for lane in timeline.lanes) for timeline in timelines)
    for timeline in timelines:
        assert [window.step for window in timeline.windows] == list(range(STEPS))
        for each in decompose(timeline):
            assert each.parts.total_ns == each.window.length_ns
            assert each.parts.compute_ns > 0
    slow = [each for each in sharing.collectives if each.longest_wait_ns > SLEEP_S * 0.5e9]
    assert {each.last_rank for each in slow} == {0, 1}
    for late in slow:
        assert late.longest_wait_ns / 1e9 == pytest.approx(SLEEP_S, rel=0.1)
