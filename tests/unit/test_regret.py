"""What following predict would have cost on published runs, and what the table says of it."""

from dataclasses import replace

import pytest

from benchmarks import published_results, regret
from benchmarks.alike import Alike, alike
from benchmarks.published_jobs import read_rows
from benchmarks.regret import Regret, Regrets, Run, blocks, misses_table, newest_run, regret_of, summary


def group(*measured_and_predicted: tuple[float, float]) -> Alike:
    first = published_results.newest_run().rows[0]
    return Alike(
        tuple(
            replace(first, tp=2**index, measured_s=measured_s, predicted_s=predicted_s)
            for index, (measured_s, predicted_s) in enumerate(measured_and_predicted)
        )
    )


def test_the_pick_is_the_least_predicted_step_and_its_regret_is_of_the_measured_best() -> None:
    found = regret_of(group((2.0, 1.0), (1.6, 1.1), (3.0, 4.0)))
    assert (found.pick.tp, found.best.tp) == (1, 2)
    assert found.share == pytest.approx(0.25)


def test_a_tie_is_no_excuse() -> None:
    assert regret_of(group((2.0, 1.0), (1.0, 1.0 + 1e-12))).share == pytest.approx(1.0)


def test_following_a_prediction_that_is_off_alike_for_all_costs_nothing() -> None:
    assert regret_of(group((2.0, 4.0), (1.0, 2.0), (3.0, 6.0))).share == 0.0


def made(*shares: float) -> Regrets:
    best = Run(1, 1, 8, 1, 2, 1.0, 1.0)
    groups = [
        Regret(
            "vtrain-single", f"gpt-{index}", "A100", 8, 16, 1024, 3, replace(best, measured_s=1 + share), best
        )
        for index, share in enumerate(shares)
    ]
    return Regrets("python -m benchmarks.regret", "2026-11-29T00:00:00", 1.0, "a file", tuple(groups))


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    said = summary(made(*[0.0] * 19, 0.5))
    assert "mean 2.5 % (bar: 3.0 %);" in said
    assert "worst 50.0 % (bar: 20.0 %, **missed**)" in said
    assert "In 19 of them" in said


def test_every_group_beyond_what_most_may_lose_is_listed_with_its_runs() -> None:
    lines = misses_table(made(0.0, 0.07, 0.5, 0.09).groups).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["gpt-2", "gpt-3"]


def test_the_newest_results_are_of_the_newest_published_run() -> None:
    run, published = newest_run(), published_results.newest_run()
    groups = [each for each in alike(published, read_rows()) if len(each.rows) >= regret.FEWEST]
    assert run.groups == tuple(regret_of(each) for each in groups)
    assert len(run.groups) == 91
    assert run.source in blocks(run)["benchmark-regret"]
