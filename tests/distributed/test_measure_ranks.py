"""The instruments of measure/ that need ranks: subjects that wait in host memory, modules alone."""

from typing import Any

import msgspec
import pytest

from shardwise.launch import run_ranks


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """Per rank: what each of the workers gave."""
    answers = run_ranks(
        "tests.distributed.measure_workers:both", b"", world_size=2, device_type="cpu", timeout_s=60
    )
    return [msgspec.json.decode(answer) for answer in answers]


def test_a_subject_that_waits_in_host_memory_between_its_steps_trains_the_same(results: list[Any]) -> None:
    for (parked, resident, held), _ in results:
        assert parked == resident
        assert len(parked) == 4
        assert parked[-1] < parked[0]
        assert held == 0


def test_any_module_can_be_timed_alone_on_both_engines(results: list[Any]) -> None:
    for _, times in results:
        assert len(times) == 8
        assert all(0 < seconds < 60 for seconds in times)
