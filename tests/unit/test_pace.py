"""When a run is said to have become slower, and what is said of it."""

from collections.abc import Iterable

import pytest

from shardwise.core.pace import LEAST_PAST, RECENT, WARM_UP, Pace
from shardwise.core.training import StepRecord

ASK = "--profile-every N says which rank is late, and in what."
SETTLED = WARM_UP + LEAST_PAST + RECENT + 10


def step(
    seconds: float, data_s: float = 0.0, rank: int = 0, beside: str | None = None, **phases: float
) -> StepRecord:
    return StepRecord(
        step=0,
        position=0,
        loss=1.0,
        gradient_norm=1.0,
        learning_rate=0.1,
        seconds=seconds,
        data_s=data_s,
        tokens=1,
        data_rank=rank,
        phases_s=phases or None,
        beside=beside,
    )


def said(steps: Iterable[StepRecord], pace: Pace | None = None) -> list[str]:
    pace = pace or Pace(0.3)
    lines = (pace.take(each) for each in steps)
    return [line.partition(": ")[2] for line in lines if line is not None]


def test_a_run_that_gets_slower_is_told_once_and_once_when_it_is_as_before() -> None:
    steps = [step(0.1)] * SETTLED + [step(0.2)] * 100 + [step(0.1)] * 20 + [step(0.2)] * 10
    slower = f"steps take 200 ms, 2.00 times what they took. It isn't waiting for text; {ASK}"
    assert said(steps) == [slower, "steps take 100 ms again.", slower]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([step(9.0)] * WARM_UP + [step(0.1)] * SETTLED, id="its first steps"),
        pytest.param([step(0.1)] * SETTLED + [step(60.0)] + [step(0.1)] * 30, id="one slow step"),
        pytest.param(([step(0.1)] * 7 + [step(0.5)]) * 20, id="one step of eight"),
        pytest.param([step(0.1)] * SETTLED + [step(0.5, beside="a save")] * 30, id="a long save"),
        pytest.param([step(0.1)] * SETTLED + [step(0.125)] * 30, id="less than the share"),
        pytest.param([step(0.2)] * SETTLED + [step(0.1)] * 60 + [step(0.11)] * 60, id="faster"),
    ],
)
def test_no_alarm_is_raised_for(steps: list[StepRecord]) -> None:
    assert said(steps) == []


def test_a_run_that_slows_down_little_by_little_is_told() -> None:
    (line,) = said(step(0.1 * 1.004**number) for number in range(400))
    assert "1.3" in line


def test_text_that_came_late_is_told_with_the_rank_that_waited() -> None:
    steps = [step(0.1, 0.001, 1)] * SETTLED + [step(0.3, 0.2, 3)] * RECENT
    assert said(steps) == [
        "steps take 300 ms, 3.00 times what they took. The time waiting for text grew from 1 ms to 200 ms, "
        "most on rank 3."
    ]


def test_the_phase_that_grew_is_told() -> None:
    steps = [step(0.1, forward=0.04, backward=0.06)] * SETTLED
    steps += [step(0.2, forward=0.05, backward=0.15)] * RECENT
    assert said(steps) == [
        f"steps take 200 ms, 2.00 times what they took. Its backward grew from 60 ms to 150 ms; {ASK}"
    ]
    even = [step(0.1, a=0.03, b=0.03, c=0.04)] * SETTLED + [step(0.2, a=0.06, b=0.06, c=0.08)] * RECENT
    assert said(even) == [f"steps take 200 ms, 2.00 times what they took. No one part grew most; {ASK}"]


def test_steps_slower_than_predicted_are_told_once() -> None:
    pace = Pace(0.3, 0.05, "a-machine")
    assert said([step(0.1)] * 200, pace) == [
        f"steps take 100 ms, 2.00 times what was predicted for a-machine, 50 ms. {ASK}"
    ]
    assert said([step(0.06)] * 200, Pace(0.3, 0.05, "a-machine")) == []


def test_steps_that_wait_for_text_say_so_against_the_prediction() -> None:
    assert said([step(0.1, 0.08, 2)] * 20, Pace(0.3, 0.01, "m")) == [
        "steps take 100 ms, 10.00 times what was predicted for m, 10 ms. 80 ms of it waiting for text, most "
        "on rank 2."
    ]
