"""docs/rowwise-or-colwise.md: its tables from made-up results, and its picture."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import measured_steps
from benchmarks.answer import MACHINES, STEP_PLANS, WHAT, AnswerRun, TablePoint, TableRun, WholeStep
from benchmarks.answer_results import _fastest, predicted_blocks
from benchmarks.results import newest

DOCS = Path(__file__).parents[2] / "docs"
sys.path.append(str(DOCS))
import ways  # noqa: E402


def point(plan: str, step_s: float, tp: int = 8) -> TablePoint:
    return TablePoint(plan, tp, 1024, step_s, 0.0, 1.0, 1, 1.0)


TPS = (2, 4, 8, 16, 32, 64)


def a_text() -> TableRun:
    points = tuple(point(plan, 1.0) for plan in ("colwise", "routed", "routed-interleaved"))
    return TableRun("x", 8, 8, "h100-sxm-80gb", "float32", "a text: of words", points)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ({"rowwise": 2.0, "colwise": 1.0}, "colwise (2.0 x)"),
        ({"rowwise": 1.04, "colwise": 1.0}, "colwise or rowwise"),
        ({"rowwise": 1.0, "colwise": 1.5, "colwise@dtensor": 0.5}, "rowwise"),
    ],
)
def test_the_fastest_are_the_native_styles_within_five_percent(times: dict[str, float], told: str) -> None:
    assert _fastest(point(plan, seconds) for plan, seconds in times.items()) == told


def test_a_step_is_told_against_pytorch_s_rowwise() -> None:
    steps = tuple(
        WholeStep("a setting", plan, machine, 1.0 + number / 100, 1.0, 2.0**30, 2.0**31, True)
        for machine in ("h100-sxm-80gb", "b200-sxm", "mi300x")
        for number, plan in enumerate(STEP_PLANS)
    )
    degrees = tuple(
        TableRun("x", 8, 8, each, "float32", "a text", tuple(point("rowwise", 1.0, tp) for tp in TPS))
        for each in ("h100-sxm-80gb", "b200-sxm", "mi300x")
    )
    command, started, texts = "python -m benchmarks.answer", "2026-11-30T00:00", (a_text(), a_text())
    made = predicted_blocks(AnswerRun(command, started, steps, degrees, degrees, (), texts))
    assert "| a setting | H100 | 1,000 ms | +1.0 % | +2.0 % |" in made["benchmark-answer-step"]
    assert "| a setting | 1.0 / 2.0 |" in made["benchmark-answer-memory"]


def test_the_picture_shows_what_each_way_sends_and_that_all_end_alike() -> None:
    rowwise, colwise, routed = ways.ways()
    assert (rowwise.sent, colwise.sent) == ((16, 16), (8, 8))
    assert sum(routed.sent) < sum(rowwise.sent)
    for way in (rowwise, colwise, routed):
        assert [[bar.id for bar in part] for part in way.ends] == [list(ways.ids_of(rank)) for rank in (0, 1)]
    # of each token exactly one rank has the row: so the sum is the embedding
    for bars in zip(*rowwise.looked_up, strict=True):
        assert sum(None not in bar.numbers for bar in bars) == 1


def test_the_picture_is_whole_xml_and_the_file_is_what_the_code_draws() -> None:
    drawn = ways.picture()
    ElementTree.fromstring(drawn)
    assert ways.PICTURE.read_text(encoding="utf-8") == drawn


def test_the_ten_lines_say_what_the_results_files_say() -> None:
    """Written by hand, so held: a fifth of the time, less than half a percent, 0.2 ms, an eighth."""
    run = newest(AnswerRun, WHAT)
    there = next(each for each in run.thread if (each.machine, each.dtype) == (MACHINES[0], "float32"))
    alone = {each.plan: each for each in there.points}
    assert 0.15 < alone["colwise@dtensor"].step_s / alone["rowwise@dtensor"].step_s < 0.25
    eighth = alone["rowwise@dtensor"].sent_bytes / 8
    assert alone["colwise@dtensor"].sent_bytes == pytest.approx(eighth, rel=0.001)
    assert alone["rowwise@dtensor"].held_bytes - alone["colwise@dtensor"].held_bytes == pytest.approx(
        1.71 * 2**30, rel=0.01
    )
    step_s = {(each.setting, each.plan, each.machine): each for each in run.steps}
    for (setting, plan, machine), step in step_s.items():
        if plan == "colwise@dtensor":
            rowwise = step_s[setting, "rowwise@dtensor", machine]
            assert 0 <= 1 - step.step_s / rowwise.step_s < 0.005
            assert step.active_bytes == pytest.approx(rowwise.active_bytes, rel=0.001)
    (exchange,) = (
        line.predicted_ms for line in measured_steps.newest_run().issue if line.what == "all-to-all, colwise"
    )
    assert exchange == pytest.approx(0.2, abs=0.01)
