"""Equal layers are traced once: the Program from 3 and 4 of them is the one from all of them, item by item, with its memory."""

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Family
from shardwise.core.program import Program, memory_peak
from shardwise.models.gpt import GPTConfig
from shardwise.models.llama import LlamaConfig
from shardwise.models.specs import ModelSpec
from shardwise.parallel.builtin import builtin_names, builtin_plan
from shardwise.trace.trace import trace

BATCH, SEQ = 4, 16
STEP = StepSettings(BATCH, SEQ)
# one plan of each engine for the settings that don't touch the embedding
BOTH_ENGINES = ("routed", "rowwise@dtensor")


def traced(
    plan: str,
    layers: int,
    device: str,
    mesh: str = "tp=2",
    settings: StepSettings = STEP,
    *,
    family: Family = Family.LLAMA,
    sp: bool = True,
    compress: bool = True,
) -> Program:
    is_tied = not plan.endswith("@dtensor")
    config = (
        LlamaConfig(96, 48, layers, 4, 2, 64)
        if family is Family.LLAMA
        else GPTConfig(96, 48, layers, 4, 64, 20, tied=is_tied)
    )
    chosen = builtin_plan(plan, sequence_parallel=sp, family=family)
    return trace(
        ModelSpec("tiny", config, ""), chosen, Mesh.parse(mesh), settings, device=device, compress=compress
    )


def assert_same(short: Program, whole: Program) -> None:
    for index, (one, other) in enumerate(zip(short.items(), whole.items(), strict=False)):
        assert one == other, f"item {index}"
    assert len(list(short.items())) == len(list(whole.items()))
    assert (short.holdings, short.resident, short.rules) == (whole.holdings, whole.resident, whole.rules)
    assert memory_peak(short) == memory_peak(whole)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", [2, 3, 8])
@pytest.mark.parametrize("plan", builtin_names())
def test_equal_layers_traced_once_are_the_whole_program(plan: str, layers: int, device: str) -> None:
    short, whole = traced(plan, layers, device), traced(plan, layers, device, compress=False)
    assert (short.compressed, whole.compressed) == (layers == 8, False)
    assert_same(short, whole)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("mesh", "settings", "sp"),
    [
        ("tp=2", StepSettings(BATCH, SEQ, recompute="full"), True),
        ("tp=2", StepSettings(BATCH, SEQ, recompute="full"), False),
        ("tp=2", StepSettings(BATCH, SEQ, accumulation=2), True),
        ("tp=2", STEP, False),
        ("dp=2,tp=2", STEP, True),
        ("fsdp=2,tp=2", STEP, True),
        ("fsdp=2,tp=2", StepSettings(BATCH, SEQ, recompute="full", accumulation=2), True),
        (
            "fsdp=2,tp=2",
            StepSettings(
                BATCH, SEQ, param_dtype="bfloat16", reduce_dtype="float32", recompute="selective-ops"
            ),
            True,
        ),
    ],
    ids=[
        "recompute",
        "recompute whole sequences",
        "accumulation",
        "whole sequences",
        "dp",
        "fsdp",
        "fsdp recompute accumulation",
        "fsdp mixed selective ops",
    ],
)
@pytest.mark.parametrize("plan", BOTH_ENGINES)
def test_equal_layers_are_exact_under_every_setting(
    plan: str, mesh: str, settings: StepSettings, sp: bool, device: str
) -> None:
    if plan == "routed" and not sp:
        plan = "rowwise"  # routed is for sharded sequences
    short, whole = (
        traced(plan, 5, device, mesh, settings, sp=sp, compress=compress) for compress in (True, False)
    )
    assert short.compressed
    assert_same(short, whole)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("recompute", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("full", "bfloat16")]
)
@pytest.mark.parametrize("plan", builtin_names())
def test_equal_layers_of_gpt_are_exact_too(plan: str, recompute: str, dtype: str, device: str) -> None:
    settings = StepSettings(BATCH, SEQ, dtype=dtype, recompute=recompute)
    short, whole = (
        traced(plan, 5, device, settings=settings, family=Family.GPT, compress=compress)
        for compress in (True, False)
    )
    assert short.compressed
    assert_same(short, whole)


@pytest.mark.parametrize(("mesh", "sp"), [("tp=2", False), ("dp=2,tp=2", True), ("fsdp=2,tp=2", True)])
@pytest.mark.parametrize("plan", ["rowwise", "rowwise@dtensor"])
def test_equal_layers_of_gpt_are_exact_on_other_meshes(plan: str, mesh: str, sp: bool) -> None:
    short, whole = (
        traced(plan, 5, "cuda", mesh, family=Family.GPT, sp=sp, compress=compress)
        for compress in (True, False)
    )
    assert short.compressed
    assert_same(short, whole)
