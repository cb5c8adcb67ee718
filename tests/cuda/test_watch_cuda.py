"""shardwise.watch() on GPUs: the same cases as tests/distributed/test_watch.py, with NCCL, where a check is
read a step later; digests are those of a CPU."""

import pytest
import torch

from shardwise.launch import run_ranks
from shardwise.watch.digest import COLUMNS, digest

GPUS = torch.cuda.device_count()
ON_TWO = pytest.mark.skipif(GPUS < 2, reason=f"2 ranks on NCCL need 2 GPUs; this machine has {GPUS}")


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("n", [7, COLUMNS, 130 * COLUMNS + 3])
def test_a_digest_on_a_gpu_is_that_on_a_cpu(dtype: torch.dtype, n: int) -> None:
    x = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    assert int(digest(x.cuda())) == int(digest(x))


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_a_digest_does_not_wait_for_the_device() -> None:
    x = torch.randn(3 * COLUMNS + 1, device="cuda")
    digest(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        digest(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_TWO
def test_on_nccl_a_right_run_is_left_alone_and_a_flipped_bit_is_named_as_the_next_step_begins() -> None:
    results = run_ranks(
        "tests.distributed.watch_workers:on_gpus", b"", world_size=2, device_type="cuda", timeout_s=120
    )
    for result in results:
        told = result.decode().splitlines()
        assert [line.partition(" isn't")[0] for line in told] == ["step 5: weight norm.weight"]
