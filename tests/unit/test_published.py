"""Which published rows are taken, how, and what the figures of the honesty page mean."""

from dataclasses import replace

import pytest
import torch

from benchmarks import machine_files
from benchmarks.mixtures import SHAPES, Latent, Mixture, Shape, plan_of
from benchmarks.published import program_of
from benchmarks.published_jobs import (
    Job,
    Traced,
    dense_job,
    job_of,
    left_out,
    not_taken,
    number,
    read_rows,
    usable,
)
from benchmarks.published_mixtures import TracedMixture, is_mixture
from benchmarks.published_results import (
    Predicted,
    Published,
    group_median,
    head_error,
    hidden_share,
    host_error,
    kendall,
    newest_run,
    quantile,
    with_others,
)
from benchmarks.published_tables import blocks, plot, summary, why
from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import AttentionKernel, Precision, Scaling
from shardwise.core.program import Op, OpKind, Phase
from shardwise.files.machine_file import machine_from_toml
from shardwise.models.factory import FactoryModel
from shardwise.predict.costs import TENSOR_HIDDEN
from shardwise.trace.trace import trace

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


def of(job: Job) -> Traced:
    """What a dense row's Program depends on."""
    assert isinstance(job.traced, Traced)
    return job.traced


def test_the_rules_by_which_rows_are_taken() -> None:
    vtrain = dense_job(row_of("vtrain-single", tp="2"))
    assert (vtrain.machine, vtrain.setup.attention, of(vtrain).recompute) == (
        "a100-sxm-80gb-vtrain",
        AttentionKernel.UNFUSED,
        "full",
    )
    assert (of(vtrain).vocab, of(dense_job(row_of("vtrain-single", tp="1"))).vocab) == (50256, 50257)
    assert vtrain.setup.waits_for_device
    megatron = dense_job(row_of("megatron-2205.05198", tp="8"))
    assert (of(megatron).vocab % (128 * 8), megatron.setup.waits_for_device) == (0, True)
    assert not dense_job(row_of("dgxc-25.04", tp="4")).setup.waits_for_device
    selective = dense_job(row_of("megatron-2205.05198", ac="selective (attn core)"))
    assert (selective.setup.recompute_attention, of(selective).recompute) == (True, "none")
    titan = dense_job(row_of("torchtitan-benchmarks", tp="8", precision="bf16"))
    assert (of(titan).data_axis, of(titan).mixed, titan.setup.precision) == ("fsdp", True, Precision.TRACED)
    assert (of(titan).plan, of(titan).fused_swiglu, titan.setup.matmul_dtype) == (
        "rowwise@dtensor",
        False,
        None,
    )
    ops = row_of("torchtitan-benchmarks", ac="selective-op", compile="1", date="2024-12")
    assert (of(dense_job(ops)).recompute, of(dense_job(ops)).plan, dense_job(ops).setup.compiled_loss) == (
        "selective-ops",
        "unsharded",
        False,
    )
    assert dense_job(ops | {"date": "2025-06"}).setup.compiled_loss
    one_rank = dense_job(row_of("torchtitan-benchmarks", dp="1", cp="8"))
    assert (of(one_rank).data_size, str(one_rank.setup.mesh)) == (1, "pp=1,fsdp=1,cp=8,tp=1")
    nemo = dense_job(row_of("dgxc-25.04", tp="4", precision="fp8"))
    assert (nemo.setup.matmul_dtype, nemo.setup.overlap_tensor, nemo.setup.overlap_data) == (
        "float8",
        True,
        True,
    )
    assert (nemo.setup.scaling, nemo.setup.compiled) == (Scaling.DELAYED, True)
    rowwise = dense_job(row_of("torchtitan-benchmarks", tp="8", precision="float8 rowwise"))
    assert (rowwise.setup.scaling, rowwise.setup.attention) == (Scaling.ROWWISE, AttentionKernel.FLASH_2)
    assert dense_job(row_of("mpt-foundry")).setup.attention is AttentionKernel.FLASH_1
    half = of(dense_job(row_of("torchtitan-benchmarks", ac="selective layer", layers="40")))
    assert (half.recompute, half.recompute_layers) == ("full", 20)
    assert (of(nemo).plan, of(nemo).fused_swiglu, nemo.setup.precision) == ("rowwise", True, Precision.MASTER)
    context = dense_job(row_of("dgxc-25.04", tp="4", cp="2"))
    assert (context.setup.context, of(context).context, of(context).seq) == (2, 2, 8192)


def test_megatron_s_recompute_runs_a_layer_to_its_end_and_pytorch_s_as_far_as_is_needed() -> None:
    shape = replace(of(dense_job(row_of("vtrain-single", tp="2"))), hidden=64, layers=2, heads=4, ffn=256)
    megatron = replace(shape, kv_heads=4, vocab=128, seq=32, max_seq=32)

    def matmuls_again(traced: Traced) -> int:
        items = program_of(traced).items()
        return sum(
            isinstance(item, Op) and item.kind is OpKind.MATMUL and item.phase is Phase.RECOMPUTE
            for item in items
        )

    assert matmuls_again(megatron) == 2 * 4
    assert matmuls_again(replace(megatron, data_axis="fsdp", data_size=2)) == 2 * 3


def test_mixtures_are_taken_by_their_model_s_name_and_its_published_shapes() -> None:
    mixtures = [row for row in USABLE if is_mixture(row)]
    assert len(mixtures) == 28
    cut = job_of(next(row for row in mixtures if row["model"] == "deepseekv2-cut4L" and row["pp"] == "2"))
    # Megatron's 4 ranks of experts are its 4 data-parallel ones
    assert (str(cut.setup.mesh), cut.setup.optimizer_shards) == ("pp=2,dp=1,ep=4,tp=1", 4)
    wide = job_of(next(row for row in mixtures if row["gpu"] == "H100"))
    assert isinstance(wide.traced, TracedMixture)
    assert (str(wide.setup.mesh), str(wide.traced.mesh)) == ("pp=4,dp=2,ep=8,tp=1", "dp=2,ep=8,tp=1")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("DeepSeekV3 (w/o MTP)", 671.0), ("Qwen3_235B_a22B", 235.1), ("GPT OSS 120B", 116.8)],
)
def test_a_mixture_of_a_published_shape_has_as_many_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = Mixture(SHAPES[name])
    # biases and sinks of GPT-OSS are left out
    assert sum(each.numel() for each in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_mixture_with_latent_attention_trains_under_its_plan() -> None:
    latent = Latent(queries=12, keys=8, plain=8, rotated=8, values=8)
    shape = Shape(
        source="", layers=3, hidden=16, heads=2, kv_heads=2, head=8, experts=4, top_k=2, inner=8, vocab=32,
        latent=latent, shared=8, dense=24, dense_layers=1,
    )  # fmt: skip
    model = Mixture(shape)
    generator = torch.Generator().manual_seed(0)
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.2, generator=generator)
    ids = torch.randint(32, (2, 8), generator=generator)
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    loss.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    source = FactoryModel("small", lambda: Mixture(shape), frozenset(), False)
    settings = StepSettings(4, 8, "bfloat16")
    program = trace(source, plan_of(shape), Mesh.parse("dp=2,ep=2"), settings, device="cuda")
    exchanges = [each.call for each in program.collectives() if each.call.kind is CollectiveKind.ALL_TO_ALL]
    assert {call.axis for call in exchanges} == {"ep"}
    held = {each.name: each.local_shape for each in program.holdings}
    assert held["layers.1.feed_forward.experts.w1"][0] == 2
    # gradients of what ranks of ep hold alike are summed over dp and ep, experts' over dp alone
    sums = {each.call.axis for each in program.collectives() if each.call.phase == Phase.REDUCE}
    assert sums == {"dp+ep", "dp"}


def test_rows_over_stages_context_ranks_and_experts_that_aren_t_taken_are_listed_with_why() -> None:
    found = list(not_taken(ROWS))
    over = [row for row in ROWS if any(number(row, axis, 1) > 1 for axis in ("pp", "cp", "ep"))]
    assert sum(each.rows for each in found) + sum(usable(row) for row in over) == len(over)
    reasons = {each.reason for each in found}
    assert {"no step time", "no machine file of a GB300", "doesn't state micro_batch"} <= reasons


def test_the_stages_and_chunks_of_every_row_that_is_taken_can_be_cut_from_its_layers() -> None:
    for row in USABLE:
        pipeline = job_of(row).setup.pipeline()
        if row["layers"] and pipeline.stages > 1:
            assert len(pipeline.spans(number(row, "layers"))) == pipeline.parts


def test_a_group_is_left_out_of_what_was_fitted_to_it() -> None:
    vtrain, titan = (
        row_of("vtrain-single", tp="2"),
        row_of("torchtitan-benchmarks", tp="8", tp_overlap="async TP (symmetric memory)"),
    )
    alone = left_out(vtrain, job_of(vtrain))
    assert (alone.machine, alone.is_fitted) == ("a100-sxm-80gb", False)
    assert job_of(titan).setup.overlap_tensor
    assert not left_out(titan, job_of(titan)).setup.overlap_tensor
    other = row_of("dgxc-25.04", tp="4")
    assert left_out(other, job_of(other)) == job_of(other)


def test_shipped_machine_files_are_what_their_sources_give() -> None:
    shares, measured = machine_files.kernel_shares(), machine_files.errors()
    for recipe in machine_files.recipes():
        text = machine_files.text_of(recipe, shares, measured)
        assert (machine_files.MACHINES / f"{recipe.name}.toml").read_text(encoding="utf-8") == text
        assert all(constant.source for constant in machine_from_toml(text).constants)


def test_fitted_constants_are_what_the_newest_run_gives() -> None:
    run = newest_run()
    assert pytest.approx(hidden_share(run), abs=0.01) == TENSOR_HIDDEN
    assert host_error(run) < 0.012
    assert all(abs(head_error(run, size)) < 0.08 for size in (4, 8))  # a twentieth is 15 %


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


def test_rows_that_are_predicted_anew_take_the_places_of_their_earlier_selves() -> None:
    before = [predicted(1.0, 2.0), predicted(3.0, 2.0)]
    anew = [predicted(3.0, 3.0), predicted(1.0, 5.0, group="other")]
    assert with_others(anew, before) == [before[0], anew[0], anew[1]]


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


def test_a_row_s_nodes_and_micro_batches_are_those_that_it_states() -> None:
    eight = row_of("torchtitan-benchmarks", gpu="H200-SXM-141GB")
    assert (dense_job(eight).per_node, dense_job(eight | {"gpus_per_node": "4"}).per_node) == (None, 4)
    assert dense_job(row_of("dgxc-25.05-gb200", gpus_per_node="4")).per_node is None  # one NVLink of 72
    stages = {"pp": "4", "dp": "2", "micro_batch": "8", "grad_accum": "1", "global_batch": "16", "vp": ""}
    cut = dense_job(eight | stages)
    assert (of(cut).micro_batch, cut.setup.micro_batches, of(cut).gathers_once) == (1, 8, True)
    more = dense_job(eight | stages | {"global_batch": "64"})
    assert (of(more).micro_batch, more.setup.micro_batches) == (8, 4)
