"""What the ranks of style_workers.py answer: one launch for each number of ranks and device, and what is
asserted of a case."""

import json
from functools import lru_cache
from typing import Any

import pytest

from shardwise.launch import run_ranks
from tests.distributed.style_cases import Case, is_telling

TOLERANCE = 1e-10


@lru_cache
def answer(world_size: int, device_type: str, *, telling: bool) -> dict[str, Any]:
    """What rank 0 says; a launch that fails is not tried again for each case."""
    try:
        results = run_ranks(
            "tests.distributed.style_workers:run",
            b"telling" if telling else b"rest",
            world_size=world_size,
            device_type=device_type,
            timeout_s=300,
        )
    except Exception as error:
        return {"failed": str(error)}
    answers = [json.loads(result) for result in results]
    # what was compared is an all-reduce's result, so every rank must have come to the same
    assert all(other["cases"] == answers[0]["cases"] for other in answers)
    return answers[0]  # type: ignore[no-any-return]


def part(world_size: int, name: str, device_type: str = "cpu", *, telling: bool | None = None) -> Any:
    """One part of the answer; fails the test that asks where the launch failed. telling: of the cases, those
    or the rest."""
    found = answer(
        world_size, device_type, telling=is_telling(name, world_size) if telling is None else telling
    )
    if "failed" in found:
        pytest.fail(f"the launch of {world_size} ranks failed: {found['failed']}")
    return found[name]


def assert_as_expected(case: Case, outcome: dict[str, Any]) -> None:
    """The sharded model equals the unsharded one, or was refused as the case says."""
    if case.refused is not None:
        assert outcome == {"refused": case.refused}
        return
    assert "refused" not in outcome, outcome["refused"]
    found = outcome["agreement"]
    assert [
        f"{finding['subject']}: {finding['reason']} ({finding['relative_error']})"
        for finding in found["findings"]
    ] == []
    assert found["tolerance"] == TOLERANCE
    assert found["loss_error"] <= TOLERANCE
    assert found["worst_gradient_error"] <= TOLERANCE
    assert found["parameters_compared"] == sum(1 for _ in case.model().parameters())
