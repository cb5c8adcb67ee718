"""Experts shared out over ep or tp, cut inside, or both: on real ranks every loss, gradient and step is one
process's, whatever the router chooses; and a planted fault is seen."""

from functools import cache

import msgspec
import pytest

from shardwise.core.mesh import Mesh
from shardwise.launch import run_ranks
from tests.distributed.expert_cases import CASES, Case
from tests.distributed.expert_workers import Proved
from tests.matrix import FULL, thinned

FAULTY = [case for case in CASES if case.has_fault]


def is_telling(case: Case) -> bool:
    return case.is_telling


@cache
def answers(world_size: int, *, telling: bool) -> tuple[dict[str, Proved], ...]:
    results = run_ranks(
        "tests.distributed.expert_workers:run",
        b"telling" if telling else b"rest",
        world_size=world_size,
        device_type="cpu",
        timeout_s=300,
    )
    return tuple(msgspec.json.decode(result, type=dict[str, Proved]) for result in results)


def proved(case: Case, *, with_fault: bool) -> list[Proved]:
    found = answers(Mesh.parse(case.mesh).world_size, telling=case.is_telling)
    return [each[f"{case.name}|{with_fault}"] for each in found]


@pytest.mark.parametrize("case", thinned(CASES, is_telling), ids=lambda case: case.name)
def test_experts_train_as_on_one_process(case: Case) -> None:
    for answer in proved(case, with_fault=False):
        assert answer.findings == ()
        assert answer.off < case.close


@pytest.mark.parametrize("case", thinned(FAULTY, is_telling), ids=lambda case: case.name)
def test_a_fault_in_a_plan_for_experts_is_found(case: Case) -> None:
    found = proved(case, with_fault=True)[0].findings
    assert any(case.found_in in finding.partition(":")[0] for finding in found), found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=FULL)])  # on 4 test_checkpoints.py has them
def test_a_checkpoint_of_experts_is_of_whole_tensors_on_any_mesh(world_size: int) -> None:
    results = run_ranks(
        "tests.distributed.expert_workers:checkpoints",
        b"",
        world_size=world_size,
        device_type="cpu",
        timeout_s=300,
    )
    for result in results:
        found = msgspec.json.decode(result, type=dict[str, list[str]])
        assert found
        assert not any(found.values()), found
