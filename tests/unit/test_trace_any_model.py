"""trace() of models that aren't ours: what goes wrong inside them as one line, what they leave without a
gradient, and equal layers once."""

import contextlib
from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shardwise.core.case import StepSettings
from shardwise.core.errors import ModelError, PlanError, ShardwiseError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, Plan, Rule, Style, StyleName, TheirPlan
from shardwise.core.program import MemoryKind, OpKind, Phase, Program, TensorSpec
from shardwise.core.verification import Verification
from shardwise.models.factory import FactoryModel
from shardwise.models.source import find_model
from shardwise.trace.catalogue import flops_of, kind_of, name_on, traffic_of
from shardwise.trace.trace import trace

BATCH, SEQ, VOCAB, HIDDEN = 2, 4, 11, 6
COLWISE_EMBEDDING = Plan(
    "columns",
    (
        Rule("embedding", Style(StyleName.COLWISE)),
        Rule("middle.norm", Style(StyleName.REPLICATE)),
        Rule("head", Style(StyleName.REPLICATE)),
    ),
)


class Tiny(nn.Module):
    """A model whose middle is `inner`, a function of hidden [B, S, H]."""

    def __init__(self, inner: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.middle = Middle(inner)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> object:
        return self.head(self.middle(self.embedding(ids_BS)))


class Middle(nn.Module):
    def __init__(self, inner: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, hidden_BSH: Tensor) -> object:
        return self.inner(self.norm(hidden_BSH))


class Backwards(torch.autograd.Function):
    """Raises in the backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        raise ValueError("no way\nback")


def traced(make: Callable[[], nn.Module], plan: AnyPlan = TheirPlan.UNSHARDED, tp: int = 1) -> Program:
    return trace(
        FactoryModel("own:tiny", make, frozenset(), False),
        plan,
        Mesh((("tp", tp),)),
        StepSettings(BATCH, SEQ),
    )


def refusal(
    make: Callable[[], nn.Module],
    kind: type[ShardwiseError],
    plan: AnyPlan = TheirPlan.UNSHARDED,
    tp: int = 1,
) -> str:
    with pytest.raises(kind) as caught:
        traced(make, plan, tp)
    return str(caught.value)


def fails(_: Tensor) -> Tensor:
    raise KeyError("width")


def test_an_error_in_a_model_s_own_code_names_the_innermost_module_in_one_line() -> None:
    assert (
        refusal(lambda: Tiny(fails), ModelError)
        == "model \"own:tiny\": middle raised KeyError: 'width'. See whether it runs with weights."
    )
    assert refusal(lambda: Tiny(fails), PlanError, COLWISE_EMBEDDING, 2) == (
        'plan "columns": model "own:tiny": middle raised KeyError: \'width\'. See whether it is explained '
        'under plan "unsharded".'
    )


def test_an_error_in_the_backward_names_the_phase() -> None:
    message = refusal(lambda: Tiny(Backwards.apply), ModelError)
    assert message == (
        'model "own:tiny": the backward after head raised ValueError: no way... See whether it runs '
        "with weights."
    )


def test_an_error_that_a_model_catches_itself_is_not_blamed() -> None:
    class Catching(Middle):
        def __init__(self) -> None:
            super().__init__(fails)
            self.bad = Middle(fails)

        def forward(self, hidden_BSH: Tensor) -> object:
            with contextlib.suppress(KeyError):
                self.bad(hidden_BSH)
            return self.inner(hidden_BSH)

    def make() -> nn.Module:
        model = Tiny(fails)
        model.middle = Catching()
        return model

    assert "middle raised KeyError: 'width'." in refusal(make, ModelError)


def test_a_model_that_reads_values_off_the_data_is_told_that_a_trace_has_none() -> None:
    assert refusal(lambda: Tiny(lambda hidden_BSH: hidden_BSH * hidden_BSH.sum().item()), ModelError) == (
        'model "own:tiny": middle raised DataDependentOutputException: aten._local_scalar_dense.default. The '
        "data decides what runs there, "
        "and a trace has only shapes."
    )


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (lambda x: x.flatten(0, 1), "shape [8, 11]"),
        (lambda x: x[:, 1:], "shape [2, 3, 11]"),
        (None, "type tuple"),
    ],
)
def test_an_output_that_is_no_logits_is_refused_in_one_line(
    inner: Callable[[Tensor], Tensor] | None, found: str
) -> None:
    class Pair(Tiny):
        def forward(self, ids_BS: Tensor) -> object:
            return (super().forward(ids_BS),)

    assert refusal(lambda: Tiny(inner) if inner else Pair(lambda x: x), ModelError) == (
        f'model "own:tiny": for ids [2, 4] its output is of {found}. Return logits [B, S, V].'
    )


def test_a_parameter_that_gets_no_gradient_has_no_optimizer_state() -> None:
    def make() -> nn.Module:
        model = Tiny(lambda x: x)
        model.vision = nn.Linear(100, 7)
        return model

    program = traced(make)
    by_name = {holding.name: holding for holding in program.holdings}
    idle = by_name["vision.weight"]
    assert (idle.grad_shape, idle.gradient_bytes, idle.optimizer_bytes, idle.parameter_bytes) == (
        None,
        0,
        0,
        2800,
    )
    # AdamW: two moments of each element, and a step of four bytes for each parameter
    trained = [holding for holding in program.holdings if holding.grad_shape is not None]
    expected = sum(2 * 4 * prod(holding.shape) + 4 for holding in trained)
    assert dict(program.resident)[MemoryKind.OPTIMIZER] == program.held(MemoryKind.OPTIMIZER) == expected


@pytest.mark.parametrize(("plan", "tp"), [(TheirPlan.HF, 2), (TheirPlan.UNSHARDED, 1)])
def test_equal_layers_of_a_hugging_face_model_traced_once_are_the_whole_program(
    plan: TheirPlan, tp: int
) -> None:
    pytest.importorskip(
        "transformers", reason="transformers isn't installed, so no type is traced: pip install shardwise[hf]"
    )
    small = (
        "vocab_size=65,hidden_size=32,intermediate_size=48,num_attention_heads=4,num_key_value_heads=2,"
        "head_dim=8,num_hidden_layers=6"
    )

    def program(compress: bool) -> Program:
        settings = StepSettings(BATCH, SEQ, dtype="bfloat16")
        return trace(
            find_model(f"hf:qwen3?{small}"),
            plan,
            Mesh((("tp", tp),)),
            settings,
            device="cuda",
            compress=compress,
        )

    short, whole = program(True), program(False)
    assert (short.compressed, whole.compressed) == (True, False)
    assert list(short.items()) == list(whole.items())
    assert (short.holdings, short.resident, short.parameters) == (
        whole.holdings,
        whole.resident,
        whole.parameters,
    )


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "masked", "expected"),
    [
        ("bfloat16", 2, False, "aten::_scaled_dot_product_flash_attention"),
        ("bfloat16", 8, True, "aten::_scaled_dot_product_efficient_attention"),
        ("float32", 8, False, "aten::_scaled_dot_product_efficient_attention"),
        ("bfloat16", 2, True, "unknown in place of aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_cuda_s_attention_depends_on_dtype_mask_and_grouped_heads(
    dtype: str, kv_heads: int, masked: bool, expected: str
) -> None:
    q, kv, mask = (
        TensorSpec(dtype, (1, 8, 16, 4)),
        TensorSpec(dtype, (1, kv_heads, 16, 4)),
        (TensorSpec("bool", (1, 1, 16, 16)),) * masked,
    )
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert name_on(name, "cpu", (q, kv, kv, *mask)) == name
    assert name_on(name, "cuda", (q, kv, kv, *mask)) == expected
    backward = name_on(
        f"{name}_backward", "cuda", (q, q, kv, kv, q, TensorSpec("float32", (1, 8, 16)), *mask)
    )
    assert backward == f"{expected}_backward"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("exp_", OpKind.ELEMENTWISE),
        ("index_fill_", OpKind.INDEX),
        ("index_fill", OpKind.INDEX),
        ("index_reduce_", OpKind.INDEX),
        ("_unsafe_masked_index_put_accumulate", OpKind.INDEX),
        ("masked_fill_", OpKind.ELEMENTWISE),
        ("index_put_", OpKind.INDEX),
        ("_foreach_lerp_", OpKind.ELEMENTWISE),
        ("_foreach_norm", OpKind.REDUCTION),
        ("new_empty_like_ones_like", OpKind.FILL),
        ("permute_copy", OpKind.COPY),
        ("no_such_", OpKind.UNKNOWN),
        ("special_zeta", OpKind.UNKNOWN),
    ],
)
def test_an_op_that_no_table_names_is_of_the_kind_that_its_form_and_family_say(
    name: str, kind: OpKind
) -> None:
    assert kind_of(f"aten::{name}", "cuda") is kind


def test_an_op_that_no_name_tells_is_of_the_kind_that_torch_s_own_tag_says() -> None:
    program = traced(lambda: Tiny(lambda hidden_BSH: torch.special.log_ndtr(hidden_BSH)))
    (op,) = [op for op in program.ops() if "log_ndtr" in op.name and op.phase is Phase.FORWARD]
    assert op.kind is OpKind.ELEMENTWISE


def test_filling_rows_writes_those_rows_and_not_the_table() -> None:
    table, rows = TensorSpec("float32", (1000, 4)), TensorSpec("int64", (5,))
    assert traffic_of("aten::index_fill_", (table, rows), (16_000, 40), (), (16_000,)) == (40, 80)


def test_a_triangular_solve_counts_its_size_squared_for_each_right_hand_side() -> None:
    matrix, sides = TensorSpec("float32", (2, 5, 5)), TensorSpec("float32", (2, 5, 3))
    assert kind_of("aten::linalg_solve_triangular", "cpu") is OpKind.MATMUL
    assert flops_of("aten::linalg_solve_triangular", (matrix, sides), (sides,), causal=False) == 2 * 5 * 5 * 3


def test_a_convolution_s_backward_counts_the_gradients_that_it_makes() -> None:
    output, inputs, weight, bias = (
        TensorSpec("float32", shape) for shape in ((2, 4, 9), (2, 3, 9), (4, 3, 1), (4,))
    )
    one = 2 * (2 * 4 * 9) * 3
    name = "aten::convolution_backward"
    assert flops_of(name, (output, inputs, weight), (inputs, weight, bias), causal=False) == 2 * one
    assert flops_of(name, (output, inputs, weight), (weight, bias), causal=False) == one


class Summed(nn.Module):
    """Its factory has the gradient of its scale summed over tp."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids_BS: Tensor) -> Tensor:
        out: Tensor = self.embed(ids_BS) * self.scale
        return out


@pytest.mark.parametrize("way", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_a_factory_has_put_on_its_parameters_run_in_the_trace(way: str) -> None:
    def make(mesh: DeviceMesh | None = None) -> nn.Module:
        model = Summed()
        if mesh is not None:
            group = mesh.get_group("tp")
            hook = (
                model.scale.register_hook
                if way == "register_hook"
                else model.scale.register_post_accumulate_grad_hook
            )
            hook(
                lambda tensor: torch.distributed.all_reduce(
                    tensor if way == "register_hook" else tensor.grad, group=group
                )
            )
        return model

    program = trace(
        FactoryModel("summed", make, frozenset({"mesh"}), False),
        TheirPlan.OWN,
        Mesh((("tp", 2),)),
        StepSettings(2, 16),
    )
    assert [call.call.payload_bytes for call in program.collectives() if call.phase is Phase.BACKWARD] == [4]


def test_as_many_layers_as_are_asked_for_are_traced() -> None:
    program = trace(
        find_model("llama3-debug"), TheirPlan.UNSHARDED, Mesh((("tp", 1),)), StepSettings(2, 16), depth=2
    )
    assert program.layers == ("layers", 2)
    assert not program.compressed


@pytest.mark.parametrize("frozen", [True, False])
def test_a_factory_that_leaves_plain_tensors_beside_dtensors_is_told_what_torch_s_clipping_does(
    frozen: bool,
) -> None:
    def make(mesh: DeviceMesh | None = None) -> nn.Module:
        model = Tiny(torch.tanh)
        if mesh is not None:
            parallelize_module(model, mesh["tp"], {"head": ColwiseParallel(output_layouts=Replicate())})
            if frozen:
                model.embedding.requires_grad_(False)
                model.middle.requires_grad_(False)
        return model

    source = FactoryModel("own:tiny", make, frozenset({"mesh"}), False)
    program = trace(source, TheirPlan.OWN, Mesh((("tp", 2),)), StepSettings(BATCH, SEQ))
    said = (
        "embedding.weight: 3 of 4 parameters are plain tensors, and the others DTensors: "
        "torch.nn.utils.clip_grad_norm_ raises on a mixture of both."
    )
    assert program.notes == (() if frozen else (said,))


def test_what_torch_s_clipping_raises_on_is_no_fault_of_the_plan() -> None:
    finding = Finding(FindingKind.CLIPPING_RAISES, "embedding.weight", "")
    verification = Verification("m", "own", 2, findings=(finding,), is_static=True)
    assert verification.wrong == ()


@pytest.mark.parametrize("seq", [4, 5])
def test_a_sequence_that_parts_make_longer_is_told_with_the_first_module_in_which_it_is(seq: int) -> None:
    """PyTorch's styles hand out local tensors, and take all parts for as long as the first."""

    def make(mesh: DeviceMesh | None = None) -> nn.Module:
        model = Tiny(torch.tanh)
        if mesh is not None:
            plan = {
                "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "middle.norm": SequenceParallel(),
                "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            }
            parallelize_module(model, mesh["tp"], plan)
        return model

    source = FactoryModel("own:tiny", make, frozenset({"mesh"}), False)
    if seq == 4:
        trace(source, TheirPlan.OWN, Mesh((("tp", 2),)), StepSettings(BATCH, seq))
        return
    with pytest.raises(ModelError) as caught:
        trace(source, TheirPlan.OWN, Mesh((("tp", 2),)), StepSettings(BATCH, seq))
    assert str(caught.value) == (
        'model "own:tiny": head: 5 positions became 6: 5 is no multiple of tp=2, and what puts parts of the '
        "sequence together takes all of them for as long as the first. Use a sequence that is a multiple of "
        "2."
    )
