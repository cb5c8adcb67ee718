"""A model whose sequences ranks share is one process's: losses, every gradient, two steps; by a gather and on
a ring, with tensors and shards cut too. And what is planted wrong is seen."""

from functools import cache

import msgspec
import pytest

from shardwise.launch import run_ranks
from tests.distributed.context_cases import ContextCase, context_cases
from tests.distributed.context_faults import FAULTS
from tests.distributed.context_workers import Off
from tests.matrix import thinned

CLOSE = 1e-10
CASES = [case for world_size in (2, 3, 4) for case in context_cases(world_size)]


@cache
def answers(world_size: int, what: str) -> list[dict[str, Off]]:
    worker = "tests.distributed.context_workers:run"
    found = run_ranks(worker, what.encode(), world_size=world_size, device_type="cpu", timeout_s=200)
    return [msgspec.json.decode(each, type=dict[str, Off]) for each in found]


@pytest.mark.parametrize("case", thinned(CASES, lambda case: case.is_telling), ids=lambda case: case.name)
def test_a_shared_sequence_trains_as_on_one_process(case: ContextCase) -> None:
    for answer in answers(case.world_size, "telling" if case.is_telling else "rest"):
        off = answer[case.name]
        assert not off.refused
        assert off.findings == ()
        assert off.worst < CLOSE


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_comparison_sees_what_is_wrong_with_a_shared_sequence(fault: object) -> None:
    assert all(answer[fault.name].findings for answer in answers(2, "faults"))  # type: ignore[attr-defined]
