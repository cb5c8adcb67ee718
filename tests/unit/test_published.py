"""Which published rows are taken, how, and what the figures of the honesty page mean."""

from dataclasses import replace

import pytest

from benchmarks import machine_files
from benchmarks.published import job_of, left_out, number, read_rows, usable
from benchmarks.published_results import (
    Predicted,
    Published,
    blocks,
    group_median,
    hidden_share,
    host_error,
    kendall,
    newest_run,
    plot,
    quantile,
    summary,
    why,
)
from shardwise.core.prediction import AttentionKernel, Precision
from shardwise.files.machine_file import machine_from_toml
from shardwise.predict.costs import TENSOR_HIDDEN

ROWS = read_rows()
USABLE = [row for row in ROWS if usable(row)]


def test_at_least_600_rows_with_tp_are_usable_and_no_time_decides_it() -> None:
    assert sum(number(row, "tp") > 1 for row in USABLE) >= 600
    for row in ROWS:
        assert usable(row | {"step_time_s": "1e9"} if row["step_time_s"] else row) is usable(row)


def test_how_a_row_is_taken_depends_on_no_time_and_no_memory() -> None:
    for row in USABLE:
        assert job_of(row) == job_of(row | {"step_time_s": "7", "peak_mem_gib": "7", "mem_kind": ""})


def row_of(group: str, **wanted: str) -> dict[str, str]:
    return next(
        row
        for row in USABLE
        if row["source_group"] == group and all(row[key] == value for key, value in wanted.items())
    )


def test_the_rules_by_which_rows_are_taken() -> None:
    vtrain = job_of(row_of("vtrain-single", tp="2"))
    assert (vtrain.machine, vtrain.setup.attention, vtrain.traced.recompute) == (
        "a100-sxm-80gb-vtrain",
        AttentionKernel.UNFUSED,
        "full",
    )
    assert vtrain.traced.vocab % (128 * 2) == 0
    selective = job_of(row_of("megatron-2205.05198", ac="selective (attn core)"))
    assert (selective.setup.recompute_attention, selective.traced.recompute) == (True, "none")
    titan = job_of(row_of("torchtitan-benchmarks", tp="8", precision="bf16"))
    assert (titan.traced.data_axis, titan.traced.mixed, titan.setup.precision) == (
        "fsdp",
        True,
        Precision.TRACED,
    )
    assert (titan.traced.plan, titan.traced.fused_swiglu, titan.setup.matmul_dtype) == (
        "rowwise@dtensor",
        False,
        None,
    )
    ops = row_of("torchtitan-benchmarks", ac="selective-op", compile="1", date="2024-12")
    assert (job_of(ops).traced.recompute, job_of(ops).traced.plan, job_of(ops).setup.compiled_loss) == (
        "selective-ops",
        "unsharded",
        False,
    )
    assert job_of(ops | {"date": "2025-06"}).setup.compiled_loss
    one_rank = job_of(row_of("torchtitan-benchmarks", dp="1", cp="8"))
    assert (one_rank.traced.data_size, str(one_rank.setup.mesh)) == (2, "pp=1,fsdp=1,cp=8,tp=1")
    nemo = job_of(row_of("dgxc-25.04", tp="4", precision="fp8"))
    assert (nemo.setup.matmul_dtype, nemo.setup.overlap_tensor, nemo.setup.overlap_data) == (
        "float8",
        True,
        True,
    )
    assert (nemo.traced.plan, nemo.traced.fused_swiglu, nemo.setup.precision) == (
        "rowwise",
        True,
        Precision.MASTER,
    )
    context = job_of(row_of("dgxc-25.04", tp="4", cp="2"))
    assert (context.setup.context, context.traced.seq, context.traced.max_seq) == (2, 4096, 8192)


def test_a_group_is_left_out_of_what_was_fitted_to_it() -> None:
    vtrain, titan = (
        row_of("vtrain-single", tp="2"),
        row_of("torchtitan-benchmarks", tp="8", tp_overlap="async TP (symmetric memory)"),
    )
    assert left_out(vtrain, job_of(vtrain)).machine == "a100-sxm-80gb"
    assert job_of(titan).setup.overlap_tensor
    assert not left_out(titan, job_of(titan)).setup.overlap_tensor
    other = row_of("dgxc-25.04", tp="4")
    assert left_out(other, job_of(other)) == job_of(other)


def test_shipped_machine_files_are_what_their_sources_give() -> None:
    shares = machine_files.kernel_shares()
    for recipe in machine_files.recipes():
        text = machine_files.text_of(recipe, shares)
        assert (machine_files.MACHINES / f"{recipe.name}.toml").read_text(encoding="utf-8") == text
        assert all(constant.source for constant in machine_from_toml(text).constants)


def test_fitted_constants_are_what_the_newest_run_gives() -> None:
    run = newest_run()
    assert pytest.approx(hidden_share(run), abs=0.01) == TENSOR_HIDDEN
    assert abs(host_error(run)) < 0.01


def predicted(measured: float, guessed: float, **changes: object) -> Predicted:
    plain = Predicted(
        "vtrain-single",
        "gpt",
        "A100",
        8,
        2,
        1,
        4,
        1,
        16,
        1024,
        12,
        "fp16",
        "full",
        measured,
        guessed,
        guessed,
        (("matmul", guessed),),
        None,
        "",
        1.0,
        1.2,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_errors_are_signed_and_quantiles_interpolate() -> None:
    assert predicted(2.0, 1.5).error == pytest.approx(-0.25)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.9) == pytest.approx(0.9)


def test_kendall_s_tau_counts_pairs_in_order() -> None:
    right = [predicted(measured, measured * 2) for measured in (1.0, 2.0, 3.0, 4.0)]
    assert kendall(right) == pytest.approx(1.0)
    assert kendall([predicted(measured, 5 - measured) for measured in (1.0, 2.0, 3.0, 4.0)]) == pytest.approx(
        -1.0
    )
    assert kendall([predicted(1.0, 1.0), predicted(1.0, 1.0)]) is None


def test_the_median_over_groups_takes_each_without_its_fits() -> None:
    rows = [
        predicted(1.0, 1.0, group=name, left_out_s=left)
        for name, left in (("a", 1.1), ("b", 1.2), ("c", 2.0))
    ]
    assert group_median(rows) == pytest.approx(0.2)


def test_memory_is_compared_with_the_kind_that_was_measured() -> None:
    assert predicted(
        1, 1, measured_gib=2.0, memory_kind="allocated (real alloc GiB)"
    ).memory_error == pytest.approx(-0.5)
    assert predicted(
        1, 1, measured_gib=1.0, memory_kind="torch max_reserved (x)"
    ).memory_error == pytest.approx(0.2)
    assert predicted(1, 1, measured_gib=1.0, memory_kind="kind not stated").memory_error is None


def test_tables_and_plot_show_every_group_and_the_misses() -> None:
    run = Published(
        "python -m benchmarks.published",
        "2026-01-01T00:00:00+00:00",
        60.0,
        (predicted(1.0, 1.1), predicted(1.0, 3.0, group="other", gpu="H100")),
    )
    made = blocks(run)
    assert "2 of them with TP > 1" in summary(run)
    assert "| other | TP > 1 | H100 | 1 | +200.0 % |" in made["benchmark-published-groups"]
    assert made["benchmark-published-worst"].index("+200.0 %") < made["benchmark-published-worst"].index(
        "+10.0 %"
    )
    assert why(run.rows[1]) == "unexplained"
    assert plot(run).count("<circle") == 4
