"""Published errors by term, pairs of rows that isolate one, and the history of what was wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.published_causes import CauseError, causes, causes_table, errors
from benchmarks.published_results import Predicted, Published, newest_run
from benchmarks.published_terms import booked, share, terms_table
from benchmarks.results import RESULTS

TERMS = (("matmul", 0.5), ("attention", 0.25), ("pipeline bubble", 0.25))
PLAIN = Predicted(
    "made-up", "gpt", "H100", 8, 2, 1, 4, 1, 16, 1024, 12, "bf16", "none", 1.0, 1.0, 1.0, TERMS, None, "",
    1.0, 1.2,
)  # fmt: skip


def run_of(*rows: Predicted, day: str = "2026-01-02") -> Published:
    return Published("python", f"{day}T00:00:00+00:00", 1.0, rows)


def test_a_share_is_of_the_predicted_step_and_attention_is_within_compute() -> None:
    assert [share(PLAIN, part) for part in ("compute", "of it attention", "bubble")] == [0.75, 0.25, 0.25]


def test_a_correlation_is_shown_where_enough_rows_differ_in_a_share() -> None:
    def row(attention: float, guessed: float) -> Predicted:
        terms = (("matmul", guessed * (1 - attention)), ("attention", guessed * attention))
        return replace(PLAIN, predicted_s=guessed, terms=terms)

    # ever too fast, the more of it is attention
    rows = [row(0.1 * step, 1 - 0.1 * step) for step in range(1, 7)]
    cells = terms_table(rows).splitlines()[2].split(" | ")
    assert cells[5] == "35%, -1.00"
    assert terms_table(rows[:5]).splitlines()[2].split(" | ")[5] == "30%"


def test_rows_that_differ_in_one_thing_book_their_error_on_it() -> None:
    """Twice the replicas take a fifth longer; predict says nothing of that."""
    more = replace(PLAIN, gpus=16, dp=8, global_batch=32, measured_s=1.2)
    made = booked([PLAIN, more, replace(more, model="other")])
    assert [(each.difference.name, each.pairs) for each in made] == [("more replicas", 1)]
    assert made[0].measured == pytest.approx(0.2)
    assert made[0].predicted == 0
    assert made[0].error == pytest.approx(1 / 1.2 - 1)


def test_more_micro_batches_are_compared_by_the_one() -> None:
    """A step of 2 s for four micro-batches and of 3 s for eight has 1 s that is done once."""
    few, many = (
        replace(PLAIN, measured_s=2.0),
        replace(PLAIN, global_batch=32, measured_s=3.0, predicted_s=2.0),
    )
    (made,) = booked([few, many])
    assert made.difference.name == "more micro-batches"
    assert made.measured == pytest.approx(-0.25)
    assert made.predicted == pytest.approx(0.0)


def test_every_cause_has_its_rows_and_its_results_files() -> None:
    newest = newest_run()
    known = causes()
    shown = causes_table(known, newest)
    assert "no such row" not in shown
    assert len(shown.splitlines()) == len(known) + 2
    assert all(cause.mend or cause.after is None for cause in known)


def test_a_cause_s_errors_are_those_of_the_files_that_it_names(tmp_path: Path) -> None:
    slow, right = replace(PLAIN, predicted_s=2.0), replace(PLAIN, predicted_s=1.1)
    for name, row in (("2026-01-01", slow), ("2026-01-02", right)):
        run_of(row, day=name).write(tmp_path)
    entry = {
        "title": "T",
        "rows": {"group": "made-up", "tp": "> 1"},
        "cause": "c",
        "mend": "m",
        "before": "2026-01-01-published.json",
        "after": "2026-01-02-published.json",
    }
    path = tmp_path / "causes.json"
    path.write_text(json.dumps([entry]), encoding="utf-8")
    shown = causes_table(causes(path), run_of(right), tmp_path)
    assert "*Mended:* m." in shown
    assert "| +100.0 %, 100.0 %, 100.0 % (2026-01-01) | +10.0 %, 10.0 %, 10.0 % (2026-01-02) |" in shown
    assert errors(causes(path)[0], run_of(replace(PLAIN, tp=1))) == "no such row"
    (tmp_path / "2026-01-01-published.json").unlink()
    with pytest.raises(CauseError, match=r"names 2026-01-01-published.json, which isn't in"):
        causes_table(causes(path), run_of(right), tmp_path)
    path.write_text(json.dumps([entry | {"rows": {"width": "1"}}]), encoding="utf-8")
    with pytest.raises(CauseError, match='"T" asks rows for width'):
        causes(path)
    assert RESULTS.is_dir()
