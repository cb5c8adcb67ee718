"""Equal layers are traced once: the Program from 3 and 4 of them is the one from all of them, item by item,
with its memory."""

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
from tests.matrix import thinned

BATCH, SEQ = 4, 16
STEP = StepSettings(BATCH, SEQ)
TELLING_OF_GPT = {("rowwise", "cuda", "full", "bfloat16")}  # PyTorch's engine: on another mesh, below


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


PLANS_AND_DEVICES = [(plan, device) for plan in builtin_names() for device in ("cpu", "cuda")]
# ways to embed that no setting below has
TELLING = {("colwise", "cpu"), ("replicated", "cpu")}


@pytest.mark.parametrize(("plan", "device"), thinned(PLANS_AND_DEVICES, lambda *case: case in TELLING))
def test_equal_layers_traced_once_are_the_whole_program(plan: str, device: str) -> None:
    layers = 6  # the fifth and the sixth are copies
    short, whole = traced(plan, layers, device), traced(plan, layers, device, compress=False)
    assert (short.compressed, whole.compressed) == (True, False)
    assert_same(short, whole)


@pytest.mark.parametrize(("layers", "is_compressed"), [(1, False), (4, False), (5, True)])
def test_more_than_four_equal_layers_are_traced_once(layers: int, is_compressed: bool) -> None:
    assert traced("rowwise", layers, "cpu").compressed == is_compressed


RECOMPUTED = StepSettings(BATCH, SEQ, recompute="full")
ACCUMULATED = StepSettings(BATCH, SEQ, accumulation=2)
BOTH = StepSettings(BATCH, SEQ, recompute="full", accumulation=2)
MIXED = StepSettings(BATCH, SEQ, param_dtype="bfloat16", reduce_dtype="float32", recompute="selective-ops")
# name, mesh, settings, sequence parallelism
SETTINGS = [
    ("recompute", "tp=2", RECOMPUTED, True),
    ("recompute whole sequences", "tp=2", RECOMPUTED, False),
    ("accumulation", "tp=2", ACCUMULATED, True),
    ("whole sequences", "tp=2", STEP, False),
    ("dp", "dp=2,tp=2", STEP, True),
    ("fsdp", "fsdp=2,tp=2", STEP, True),
    ("fsdp recompute accumulation", "fsdp=2,tp=2", BOTH, True),
    ("fsdp mixed selective ops", "fsdp=2,tp=2", MIXED, True),
]
# each setting under one engine on one device, beside others where they can be; FSDP under both
TELLING_SETTINGS = {
    ("routed", "cuda"): ("whole sequences", "fsdp recompute accumulation"),
    ("rowwise@dtensor", "cpu"): ("dp", "fsdp mixed selective ops"),
}
EXACT = [
    (plan, device, *setting)
    for plan in ("routed", "rowwise@dtensor")
    for device in ("cuda", "cpu")
    for setting in SETTINGS
]


@pytest.mark.parametrize(
    ("plan", "device", "name", "mesh", "settings", "sp"),
    thinned(EXACT, lambda plan, device, name, *_: name in TELLING_SETTINGS.get((plan, device), ())),
    ids=[f"{name}-{plan}-{device}" for plan, device, name, *_ in EXACT],
)
def test_equal_layers_are_exact_under_every_setting(
    plan: str, device: str, name: str, mesh: str, settings: StepSettings, sp: bool
) -> None:
    if plan == "routed" and not sp:
        plan = "rowwise"  # routed is for sharded sequences
    short, whole = (
        traced(plan, 5, device, mesh, settings, sp=sp, compress=compress) for compress in (True, False)
    )
    assert short.compressed
    assert_same(short, whole)


@pytest.mark.parametrize(
    ("plan", "device", "recompute", "dtype"),
    thinned(
        [
            (plan, device, recompute, dtype)
            for plan, device in PLANS_AND_DEVICES
            for recompute, dtype in (("none", "float32"), ("none", "bfloat16"), ("full", "bfloat16"))
        ],
        lambda *case: case in TELLING_OF_GPT,
    ),
)
def test_equal_layers_of_gpt_are_exact_too(plan: str, recompute: str, dtype: str, device: str) -> None:
    settings = StepSettings(BATCH, SEQ, dtype=dtype, recompute=recompute)
    short, whole = (
        traced(plan, 5, device, settings=settings, family=Family.GPT, compress=compress)
        for compress in (True, False)
    )
    assert short.compressed
    assert_same(short, whole)


@pytest.mark.parametrize(
    ("plan", "mesh", "sp"),
    thinned(
        [
            (plan, mesh, sp)
            for plan in ("rowwise", "rowwise@dtensor")
            for mesh, sp in (("tp=2", False), ("dp=2,tp=2", True), ("fsdp=2,tp=2", True))
        ],
        # of dp and tp test_two_kinds_of_layers.py has one; whole sequences: Llama's, above
        lambda plan, mesh, _: (plan, mesh) == ("rowwise@dtensor", "fsdp=2,tp=2"),
    ),
)
def test_equal_layers_of_gpt_are_exact_on_other_meshes(plan: str, mesh: str, sp: bool) -> None:
    short, whole = (
        traced(plan, 5, "cuda", mesh, family=Family.GPT, sp=sp, compress=compress)
        for compress in (True, False)
    )
    assert short.compressed
    assert_same(short, whole)
