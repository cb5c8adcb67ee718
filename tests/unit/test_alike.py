"""Which published runs differ only in how they are sharded, and what a machine file says of itself."""

from dataclasses import replace

import pytest

from benchmarks.alike import ENOUGH, SHARDED, Alike, alike, machine_errors, ratio_errors
from benchmarks.published_jobs import read_rows
from benchmarks.published_results import newest_run
from shardwise.predict.machines import load_machine

RUN, ROWS = newest_run(), read_rows()
GROUPS = alike(RUN, ROWS)


def test_every_vtrain_model_batch_and_number_of_gpus_is_a_group_and_simumax_s_four_with_three_runs() -> None:
    sizes = [(group.first.group, len(group.rows)) for group in GROUPS if len(group.rows) >= 3]
    named = [name for name, _ in sizes]
    assert (named.count("vtrain-single"), named.count("simumax-b200-real")) == (85, 4)
    assert sorted(size for name, size in sizes if name == "vtrain-multi") == [21, 26]


def test_runs_of_a_group_have_one_model_batch_recompute_and_number_of_gpus() -> None:
    for group in GROUPS:
        for name in ("model", "gpu", "gpus", "global_batch", "precision", "recompute"):
            assert len({getattr(row, name) for row in group.rows}) == 1, (name, group.first)


def test_a_run_that_differs_in_anything_else_is_in_no_group_with_it() -> None:
    row = next(row for row in ROWS if row["source_group"] == "vtrain-multi" and row["hidden"] == "3072")
    changed = [{**each, "framework": "another"} if each is row else each for each in ROWS]
    multi = [len(each.rows) for each in alike(RUN, changed) if each.first.group == "vtrain-multi"]
    assert sorted(multi) == [21, 25]
    assert "framework" not in SHARDED


def test_an_error_of_ratios_forgives_what_is_off_alike_for_all_plans() -> None:
    one, other = GROUPS[0].rows[:2]
    slow = [replace(row, predicted_s=row.measured_s * 1.3) for row in (one, other)]
    assert ratio_errors(Alike(tuple(slow))) == [pytest.approx(0.0)]
    apart = (slow[0], replace(slow[1], predicted_s=slow[1].measured_s))
    assert ratio_errors(Alike(apart)) == [pytest.approx(0.3)]


def test_a_machine_says_its_error_of_pairs_where_there_are_enough_and_of_no_run_that_it_was_fitted_to() -> (
    None
):
    errors = machine_errors(RUN, ROWS)
    assert errors["b200-sxm"].of == "pairs"
    assert errors["h100-sxm-80gb"].of == "runs"
    assert "h200-sxm-141gb" not in errors  # two runs
    assert all(error.count >= ENOUGH for error in errors.values())
    fitted = [row.group == "vtrain-single" and row.hidden == 1024 for row in RUN.rows]
    wild = tuple(
        replace(row, predicted_s=(2 + row.tp) * row.measured_s) if is_fitted else row
        for row, is_fitted in zip(RUN.rows, fitted, strict=True)
    )
    assert sum(fitted) > 500
    assert machine_errors(replace(RUN, rows=wild), ROWS) == errors


def test_shipped_machines_say_how_far_off_predictions_on_them_were() -> None:
    errors = machine_errors(RUN, ROWS)
    assert load_machine("b200-sxm").error == pytest.approx(errors["b200-sxm"].share, abs=5e-4)
    assert load_machine("mi300x").error is None
