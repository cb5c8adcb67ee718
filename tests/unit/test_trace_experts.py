"""Experts in a Program: one grouped matmul over what the router sends, in every dtype that CUDA multiplies
so, under FSDP's mixed precision too; its FLOPs, its bytes, and the memory of a real step."""

import logging
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import ModelError
from shardwise.core.grouped import GROUPED, grouped_product, load_words
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Op, OpKind, Phase, Program, TensorSpec, memory_peak
from shardwise.core.rule import ModuleKind, RuleRef
from shardwise.explain.reasons import reason_of
from shardwise.models.source import find_model
from shardwise.step.train import TrainStep
from shardwise.trace.catalogue import flops_of, traffic_of
from shardwise.trace.trace import trace
from tests.allocated import begin_and_peak

pytest.importorskip(
    "transformers", reason="transformers isn't installed, so no type is traced: pip install shardwise[hf]"
)
EXPERTS, CHOSEN, BATCH, SEQ = 8, 2, 2, 64
SIZES = (
    "vocab_size=512,hidden_size=64,intermediate_size=96,num_hidden_layers=2,num_attention_heads=4,"
    "num_key_value_heads=2"
)
QWEN = f"hf:qwen3_moe?{SIZES},num_experts={EXPERTS},num_experts_per_tok={CHOSEN},moe_intermediate_size=32"
MIXTRAL = f"hf:mixtral?{SIZES},num_local_experts={EXPERTS},num_experts_per_tok={CHOSEN}"
ROWS = BATCH * SEQ * CHOSEN


@cache
def program_of(
    model: str = QWEN, dtype: str = "bfloat16", mesh: str = "tp=1", param_dtype: str | None = None
) -> Program:
    at = Mesh.parse(mesh)
    settings = StepSettings(BATCH * at.data_parallel, SEQ, dtype=dtype, param_dtype=param_dtype)
    return trace(find_model(model), TheirPlan.UNSHARDED, at, settings, device="cuda")


def matmuls(program: Program, name: str) -> list[Op]:
    return [op for op in program.ops() if op.name == name]


@pytest.mark.parametrize("model", [QWEN, MIXTRAL])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_are_one_grouped_matmul_in_every_dtype_that_cuda_multiplies_so(
    model: str, dtype: str
) -> None:
    program = program_of(model, dtype)
    found = matmuls(program, GROUPED)
    # two layers; gate and up in one, and down: forward, and two gradients each
    assert len(found) == 2 * 2 * 3
    assert {op.inputs[0].dtype for op in found} == {dtype}
    assert not [op for op in matmuls(program, "aten::bmm") if op.module.endswith("experts")]
    assert load_words(1) in program.notes


def test_under_transformers_own_plan_they_are_still_known_as_experts() -> None:
    settings = StepSettings(BATCH, SEQ, dtype="bfloat16")
    program = trace(find_model(MIXTRAL), TheirPlan.HF, Mesh.parse("tp=2"), settings, device="cuda")
    assert load_words(1) in program.notes
    sums = [each for each in program.collectives() if each.module.endswith("experts")]
    assert {each.module_kind for each in sums} == {ModuleKind.EXPERTS}
    assert all("of the experts" in reason_of(each) for each in sums)


def test_under_the_plan_for_experts_tokens_travel_as_if_load_were_balanced() -> None:
    settings = StepSettings(BATCH, SEQ, dtype="bfloat16")
    program = trace(find_model(MIXTRAL), TheirPlan.HF_EP, Mesh.parse("tp=2"), settings, device="cuda")
    held = {each.name: each for each in program.holdings}["model.layers.0.mlp.experts.gate_up_proj"]
    assert held.local_shape == (EXPERTS // 2, *held.shape[1:])
    assert held.rule == RuleRef("model.layers.*.mlp.experts", "ep_dispatch_experts")
    travels = [call.call for call in program.collectives() if call.call.kind is CollectiveKind.ALL_TO_ALL]
    tokens = [call for call in travels if call.dtype == "bfloat16"]
    # of two layers: tokens go and come, forward and backward, and counts before them
    assert (len(tokens), len(travels)) == (2 * 4, 2 * 5)
    # each rank has half of the tokens, and half of their choices are of the other's experts
    assert {call.wire_bytes for call in tokens} == {ROWS / 2 / 2 * 64 * 2}
    rows = {op.inputs[0].shape[0] for op in matmuls(program, GROUPED) if op.phase is Phase.FORWARD}
    assert rows == {ROWS // 2}


def test_under_fsdp_s_mixed_precision_they_multiply_in_its_dtype_and_copy_no_weights() -> None:
    mixed = program_of(dtype="float32", mesh="fsdp=2", param_dtype="bfloat16")
    assert {op.inputs[0].dtype for op in matmuls(mixed, GROUPED)} == {"bfloat16"}
    assert memory_peak(mixed).n_bytes < memory_peak(program_of(dtype="float32")).n_bytes


def test_float64_has_no_grouped_kernel_and_copies_the_weights_that_each_token_meets() -> None:
    program = program_of(dtype="float64")
    assert not matmuls(program, GROUPED)
    assert memory_peak(program).n_bytes > 4 * memory_peak(program_of(dtype="float32")).n_bytes
    assert any(note.startswith("Experts are multiplied by grouped_mm") for note in program.notes)


def test_a_width_that_the_kernel_refuses_is_refused() -> None:
    odd = QWEN.replace("moe_intermediate_size=32", "moe_intermediate_size=33")
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(ModelError, match=r"mlp\.experts raised .*multiple of 16 bytes"):
            program_of(odd, dtype)


def specs(*shapes: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    return (*(TensorSpec("bfloat16", shape) for shape in shapes[:2]), TensorSpec("int32", shapes[2]))


@pytest.mark.parametrize(
    ("shapes", "product", "read_bytes"),
    [
        # 12 rows of 3 experts: rows and all matrices
        (((12, 5), (3, 5, 7), (3,)), (3, 4, 7, 5), 2 * (12 * 5 + 3 * 5 * 7) + 12),
        # two rows: two of three matrices
        (((2, 5), (3, 5, 7), (3,)), (2, 1, 7, 5), 2 * (2 * 5 + 2 * 5 * 7) + 12),
        # each expert's matrix times its columns
        (((3, 7, 5), (5, 12), (3,)), (3, 7, 4, 5), 2 * (3 * 5 * 7 + 12 * 5) + 12),
        # the matrices' gradient
        (((5, 12), (12, 7), (3,)), (3, 5, 7, 4), 2 * (12 * 5 + 12 * 7) + 12),
    ],
)
def test_a_grouped_matmul_multiplies_its_rows_and_reads_the_matrices_that_they_meet(
    shapes: tuple[tuple[int, ...], ...], product: tuple[int, ...], read_bytes: int
) -> None:
    inputs = specs(*shapes)
    made = grouped_product(inputs)
    assert (made.met, made.m, made.n, made.k) == product
    rows = 2 if shapes[0][0] == 2 else 12
    assert flops_of(GROUPED, inputs, (), causal=False) == 2 * rows * 5 * 7
    n_bytes = [2 * torch.Size(spec.shape).numel() for spec in inputs[:2]] + [4 * 3]
    assert traffic_of(GROUPED, inputs, n_bytes, [100], []) == (read_bytes, 100)


def test_a_program_s_experts_count_the_flops_of_the_tokens_that_the_router_sends() -> None:
    found = matmuls(program_of(), GROUPED)
    assert {op.kind for op in found} == {OpKind.MATMUL}
    # gate and up [64 x 64], and down [32 x 64], forward and twice backward
    assert sum(op.flops for op in found) == 2 * 3 * 2 * ROWS * (64 * 64 + 32 * 64)


@pytest.mark.parametrize("model", [QWEN, MIXTRAL])
def test_the_peak_of_a_real_step_with_grouped_matmuls_is_that_of_its_program(model: str) -> None:
    settings = StepSettings(BATCH, SEQ, dtype="bfloat16")
    source = find_model(model)
    program = trace(source, TheirPlan.UNSHARDED, Mesh.parse("tp=1"), settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model_ = source.build(dtype=torch.bfloat16, device="cpu")
        model_.set_experts_implementation("grouped_mm")  # type: ignore[operator]  # transformers' method
        ids_BS = torch.randint(512, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
        batch = [(ids_BS.clone(), ids_BS.roll(-1, 1))]
        step = TrainStep(model_, mesh=None)
        step(batch)
        step.optimizer.zero_grad(set_to_none=True)
        with record_function("the second step"):
            step(batch)
    _, peak = begin_and_peak(profiler, "the second step")
    assert memory_peak(program).n_bytes == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(("dtype", "size", "unit"), [("float32", 360, 4), ("bfloat16", 180, 8)])
def test_a_width_that_grouped_kernels_do_not_take_is_told_in_one_sentence_and_pytorch_logs_nothing(
    dtype: str, size: int, unit: int
) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        with pytest.raises(ModelError) as refused:
            program_of(MIXTRAL.replace("intermediate_size=96", "intermediate_size=90"), dtype)
    finally:
        logger.removeHandler(handler)
    assert not logged
    assert (
        f"a grouped matmul takes rows of a multiple of 16 bytes, and 90 numbers of {dtype} are {size}: a "
        f"rank's part of its width must be a multiple of {unit}. See whether"
    ) in str(refused.value)
