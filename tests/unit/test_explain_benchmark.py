"""The benchmarks of `shardwise explain` and `plan`: its file, and what its table says of the bars."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.explain_results import Run, Timed, blocks, newest_run
from shardwise.core.measurement import Environment

GIB = 2**30


def timed(wall_s: tuple[float, ...], n_bytes: int = GIB // 2) -> Timed:
    return Timed("a", "shardwise explain", wall_s, (n_bytes,) * len(wall_s), 8, int(0.6 * GIB))


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (timed((7.0, 7.9, 8.0)), "met"),
        (timed((7.0, 7.9, 8.1)), "met by the median only"),
        (timed((7.0, 8.1, 8.1)), "**MISSED**"),
        (timed((7.0, 7.0, 7.0), GIB), "**MISSED**"),
        (Timed("b", "shardwise explain", (9.0,), (GIB,)), ""),
    ],
)
def test_a_verdict_is_met_only_where_every_round_meets_the_bar(one: Timed, verdict: str) -> None:
    assert one.verdict == verdict


def run(environment: Environment) -> Run:
    few, many = (
        timed((4.0, 5.0, 6.0)),
        Timed("many", "shardwise explain many", (4.0, 5.5, 6.0), (1, 1, 1), same_as="a"),
    )
    return Run(environment, 3, (0.1, 1.0), (few, many))


def environment() -> Environment:
    return Environment(
        "python -m benchmarks.explain",
        "2026-11-25T00:00:00Z",
        "a machine",
        "cpu",
        "none",
        1,
        1,
        2,
        None,
        (("torch", "2.13"),),
        (),
    )


def test_the_table_says_how_long_each_took_and_what_more_ranks_cost() -> None:
    text = blocks(run(environment()))["benchmark-explain-speed"]
    assert "| `shardwise explain` | 5.0 | 4.0 to 6.0 | 0.50 | at most 8 s, 0.6 GiB | met |" in text
    assert (
        "- many: 1.00 of the time of a (rounds 1.00 to 1.10; the rounds of a are 0.80 to 1.20 of their own "
        "median)" in text
    )


def test_a_bar_on_the_ratio_is_told_with_its_verdict() -> None:
    base = run(environment())
    few, many = base.timed
    for most, verdict in ((1.2, "met"), (1.05, "met by the median only"), (0.9, "**MISSED**")):
        held = replace(base, timed=(few, replace(many, max_ratio=most)), what="plan-speed")
        assert f"; bar: at most {most:g}: {verdict}" in blocks(held)["benchmark-plan-speed"]


def test_the_newest_file_counts(tmp_path: Path) -> None:
    written = run(environment())
    assert written.write(tmp_path).name == "2026-11-25-explain-speed.json"
    assert newest_run(tmp_path) == written
