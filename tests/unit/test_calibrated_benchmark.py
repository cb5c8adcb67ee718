"""benchmarks/calibrated: how many runs in a row meet the bar, and which term a plan missed by."""

from datetime import UTC, datetime

import pytest

from benchmarks.calibrated_results import Predicted, Run, Runs, blocks
from shardwise.calibrate.clock import Timing, usual_share
from shardwise.core.measurement import Environment

TERMS = (("matmul", 0.9, 0.8), ("waiting for late ranks", None, 0.3), ("memory-bound kernels", 0.1, 0.15))


def plan(step_s: float, name: str = "rowwise") -> Predicted:
    """Predicted at one second."""
    return Predicted(name, (step_s,) * 3, (0.1,) * 3, 1.0, 1.0, 0.1, (("matmul", 1.0),), TERMS)


def run(*plans: Predicted) -> Run:
    where = Environment(
        command="python -m benchmarks.calibrated",
        started=datetime(2026, 11, 30, tzinfo=UTC).isoformat(),
        machine="m",
        cores=2,
        memory_bytes=None,
        device="cpu",
        backend="gloo",
        world_size=2,
        threads_per_rank=1,
        versions=(("torch", "2.13.0"),),
        variables=(),
    )
    return Run(where, {"rounds": 3}, (1.0, 1.0, 1.0), 0.9, 0.9, 100.0, 100.0, plans, ())


def test_a_run_meets_the_bar_where_every_plan_is_within_it() -> None:
    assert run(plan(1.0), plan(1.1, "colwise")).is_met
    assert not run(plan(1.0), plan(1.2, "colwise")).is_met


def test_a_plan_that_misses_says_in_which_term_the_way_it_missed() -> None:
    assert plan(1.0).missed_by is None
    assert plan(1.5).missed_by == ("waiting for late ranks", -0.3)  # too fast: matmul is off the other way
    slow = plan(0.5).missed_by
    assert slow is not None
    assert slow[0] == "matmul"


def test_the_table_has_every_run_and_says_whether_enough_of_them_met_it() -> None:
    good, bad = run(plan(1.0)), run(plan(1.5))
    text = blocks(Runs((good, good, bad, good, good)))["benchmark-calibrated"]
    assert "in at least 80% of the runs in a row: 4 of 5, met." in text
    assert "| 3 | rowwise | 1,500 |" in text
    assert "waiting for late ranks -300 ms" in text
    terms = blocks(Runs((good, bad)))["benchmark-calibrated-terms"]
    assert "| 1 | rowwise | 900 / 800 | – / 300 | 100 / 150 |" in terms
    assert "1 of 2, **MISSED**" in blocks(Runs((good, bad)))["benchmark-calibrated"]


def test_a_program_that_ran_beside_a_few_kernels_is_not_the_machine_s_pace() -> None:
    alone = [Timing(0.01, 0.01, 0.01, 5, own_s=1.0, wall_s=1.0 / 0.95)] * 8
    beside = [Timing(0.01, 0.01, 0.01, 5, own_s=1.0, wall_s=4.0)] * 2
    assert usual_share([*beside, *alone]) == pytest.approx(0.95)
    assert usual_share(beside) == pytest.approx(0.25)
    assert usual_share([]) == 1.0
