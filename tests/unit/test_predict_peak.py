"""The peak is that of the true mesh and setup: few states of each rank's, context ranks, a compiled loss,
what the allocator reserves."""

import json
from dataclasses import replace

import pytest

from benchmarks.measured_steps import STEPS, step_of
from shardwise.core.case import StepSettings, TextSource
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import counts_of
from shardwise.core.plan import TheirPlan
from shardwise.core.prediction import Setup
from shardwise.core.program import Block, MemoryChange, MemoryKind, Phase, Program, memory_peak
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_plan
from shardwise.predict.changes import fused_loss
from shardwise.predict.groups import groups_of
from shardwise.predict.machines import load_machine
from shardwise.predict.memory import forecast, of_stage, peak_by_kind
from shardwise.predict.stage_memory import stage_parts
from shardwise.predict.traced import micro_batch
from shardwise.trace.trace import trace
from shardwise.verbs.programs import trace_program
from shardwise.verbs.progress import silent
from tests.matrix import FULL

GIB = 2**30
PEAKS = (
    MemoryChange(4 * GIB, MemoryKind.ACTIVATION, Phase.FORWARD, "", "a"),
    MemoryChange(-4 * GIB, MemoryKind.ACTIVATION, Phase.FORWARD, "", "a"),
    MemoryChange(6 * GIB, MemoryKind.GRADIENT, Phase.BACKWARD, "", "g"),
)
PROGRAM = Program(
    "m",
    "p",
    "native",
    "cuda",
    0,
    (("fsdp", 2), ("tp", 1)),
    StepSettings(2, 8),
    1,
    (Block(PEAKS),),
    (),
    (),
    ((MemoryKind.PARAMETER, GIB),),
)


def of(mesh: str, micro_batches: int = 1) -> Setup:
    return Setup(Mesh.parse(mesh), micro_batches)


def test_with_more_shards_the_peak_moves_to_the_activations() -> None:
    machine = load_machine("h100-sxm-80gb")
    as_traced = dict(forecast(PROGRAM, machine, Setup()).by_kind)
    assert as_traced == {MemoryKind.PARAMETER: GIB, MemoryKind.GRADIENT: 6 * GIB}
    larger = dict(forecast(PROGRAM, machine, of("fsdp=64")).by_kind)
    assert larger == {MemoryKind.PARAMETER: GIB / 32, MemoryKind.ACTIVATION: 4 * GIB}


def test_more_shards_never_take_more() -> None:
    machine = load_machine("h100-sxm-80gb")
    found = [forecast(PROGRAM, machine, of(f"fsdp={2**power}")).active_bytes for power in range(1, 12)]
    assert found == sorted(found, reverse=True)


def test_without_what_lives_in_layers_only_what_is_resident_is_left() -> None:
    machine = load_machine("h100-sxm-80gb")
    assert dict(forecast(replace(PROGRAM, blocks=()), machine, Setup()).by_kind) == {
        MemoryKind.PARAMETER: GIB
    }


STAGED = ModelSpec("staged", LlamaConfig(8192, 256, 6, 8, 4, 512), "")


@pytest.mark.parametrize(
    ("mesh", "micro_batches", "layers", "recomputed", "reshard", "within"),
    [
        pytest.param("pp=2,tp=2", 4, "even", 0, True, 0.01, marks=FULL),
        ("pp=3,tp=1", 6, "1,3,2", 0, True, 0.02),
        pytest.param("pp=2,fsdp=2,tp=1", 2, "even", 0, True, 0.02, marks=FULL),
        ("pp=2,fsdp=2,tp=1", 2, "even", 3, True, 0.03),
        pytest.param("pp=3,fsdp=2,tp=1", 4, "even", 6, True, 0.02, marks=FULL),
        ("pp=3,fsdp=2,tp=1", 4, "even", 0, False, 0.01),
        pytest.param("pp=3,fsdp=2,tp=1", 4, "even", 6, False, 0.04, marks=FULL),
        pytest.param("pp=2,tp=2", 4, "2,4", 2, True, 0.02, marks=FULL),
    ],
)
def test_each_stage_holds_what_its_own_trace_does(
    mesh: str, micro_batches: int, layers: str, recomputed: int, reshard: bool, within: float
) -> None:
    axes = Mesh.parse(mesh)
    batch = axes.data_parallel * micro_batches * 4
    settings = StepSettings(
        batch, 128, accumulation=micro_batches, stages=layers, reshard_after_forward=reshard
    )
    if recomputed:
        settings = replace(settings, recompute="full", recompute_layers=recomputed)
    plan = builtin_plan("rowwise")
    part = micro_batch(settings, axes)
    one = trace_program(STAGED, plan, axes, part, TextSource(random_ids=True), "cuda", silent)
    setup = Setup(axes, micro_batches, layers=counts_of(layers))
    found = {each.stage: sum(of_stage(one, setup, each).values()) for each in stage_parts(one, setup)}
    traced = {}
    for stage in found:
        rank = stage * (axes.world_size // axes.stages)
        traced[stage] = memory_peak(trace(STAGED, plan, axes, settings, device="cuda", rank=rank)).n_bytes
    assert {0, axes.stages - 1} <= found.keys()
    assert found == pytest.approx(traced, rel=within)
    fullest = max(found, key=lambda stage: found[stage])
    whole = forecast(one, replace(load_machine("h100-sxm-80gb"), workspace_bytes=0.0), setup)
    assert whole.stage == fullest
    assert whole.active_bytes == pytest.approx(found[fullest])


def test_a_tied_table_is_held_by_both_ends() -> None:
    tied = ModelSpec("tied", LlamaConfig(2048, 64, 4, 4, 2, 128, tied=True), "")
    one = trace(tied, TheirPlan.UNSHARDED, Mesh.parse("tp=1"), StepSettings(2, 16), device="cuda")
    first, last = stage_parts(one, of("pp=2", 2))
    table = next(holding for holding in one.holdings if holding.is_outer).parameter_bytes
    rest = one.held(MemoryKind.PARAMETER) - table
    share = MemoryKind.PARAMETER
    assert (first.shares[share] + last.shares[share]) * (table + rest) == pytest.approx(2 * table + rest)
    assert (first.tied_bytes, last.tied_bytes) == (table, 0)


def sizes_of(program: Program, mesh: str) -> dict[str, int]:
    return {name: group.size for name, group in groups_of(program, of(mesh)).items()}


def test_context_ranks_share_fsdp_s_shards() -> None:
    machine = load_machine("h100-sxm-80gb")
    assert sizes_of(PROGRAM, "fsdp=1,cp=8") == {"fsdp": 8, "tp": 1}
    alone, shared = (forecast(PROGRAM, machine, of(f"fsdp=2,cp={count}")) for count in (1, 4))
    assert dict(shared.by_kind) == {MemoryKind.PARAMETER: GIB / 4, MemoryKind.ACTIVATION: 4 * GIB}
    assert shared.active_bytes < alone.active_bytes
    whole = replace(PROGRAM, axes=(("tp", 2),))
    assert sizes_of(whole, "cp=8,tp=2") == {"tp": 2}


def test_a_compiled_loss_holds_logits_and_their_gradient_and_nothing_in_float32() -> None:
    settings = StepSettings(4, 64, param_dtype="bfloat16", reduce_dtype="float32")
    spec = ModelSpec("wide head", LlamaConfig(65_536, 32, 2, 2, 2, 64), "")
    program = trace(spec, TheirPlan.UNSHARDED, Mesh.parse("fsdp=2,tp=1"), settings, device="cuda")
    logits, gathered = 2 * 64 * 65_536 * 2, 2 * 65_536 * 32 * 2  # both tables are gathered then
    eager, fused = (peak_by_kind(program, Setup(compiled_loss=fused)) for fused in (False, True))
    assert eager[MemoryKind.ACTIVATION] + eager[MemoryKind.TEMPORARY] == pytest.approx(
        3 * 2 * logits + gathered, rel=0.05
    )
    assert fused[MemoryKind.ACTIVATION] + fused[MemoryKind.TEMPORARY] == pytest.approx(
        2 * logits + gathered, rel=0.05
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_comes_with_a_compiled_loss_goes_again(dtype: str) -> None:
    settings = StepSettings(4, 64, dtype)
    for plan in ("rowwise", "rowwise@dtensor"):
        program = trace(
            ModelSpec("head", LlamaConfig(8192, 32, 2, 2, 2, 64), ""),
            builtin_plan(plan),
            Mesh.parse("tp=2"),
            settings,
            device="cuda",
        )
        changes = fused_loss(program).values()
        assert sum(changes) == 0
        logits = 4 * 64 * 8192 // 2 * (2 if dtype == "bfloat16" else 4)
        assert sum(n_bytes for n_bytes in changes if n_bytes > 0) == 2 * logits


def test_what_a_compiler_leaves_is_what_a_gpu_held() -> None:
    ran = [
        step
        for step in json.loads(STEPS["h100-sxm-80gb"].read_text(encoding="utf-8"))["steps"]
        if step.get("compiled_loss")
    ]
    assert {step["compiled"] for step in ran} == {False, True}
    for each in ran:
        step = step_of(each, load_machine("h100-sxm-80gb"))
        assert step.predicted_active_gib == pytest.approx(step.measured_active_gib, rel=0.01), step.tag
