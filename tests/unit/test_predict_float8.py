"""What float8 costs: which matmuls run in it, their casts, and what is gathered in it."""

from dataclasses import replace

import pytest

from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.prediction import Scaling, Setup
from shardwise.core.program import Collective, Item, Op, OpKind, Phase, TensorSpec
from shardwise.predict.float8 import CAST, gathers_float8, is_float8, with_casts

TOKENS, WIDE, OUT = 64, 32, 16
PLAIN = Setup(matmul_dtype="float8", scaling=Scaling.TENSORWISE)


def matmul(
    *shapes: tuple[int, int],
    module: str = "layers.0.wq",
    phase: Phase = Phase.FORWARD,
    name: str = "aten::mm",
) -> Op:
    specs = tuple(TensorSpec("bfloat16", shape) for shape in shapes)
    out = TensorSpec("bfloat16", (shapes[0][0], shapes[1][1]))
    return Op(name, OpKind.MATMUL, phase, module, specs, (out,), 0, 0, 0)


def gather(n_bytes: int, ranks: int, module: str = "layers.0.attention") -> Collective:
    call = CollectiveCall(
        CollectiveKind.ALL_GATHER, "tp", ranks, "bfloat16", n_bytes, n_bytes * (ranks - 1) / ranks, "forward"
    )
    return Collective(call, module)


FORWARD = matmul((TOKENS, WIDE), (WIDE, OUT))
BACKWARD = matmul((OUT, TOKENS), (TOKENS, WIDE), phase=Phase.BACKWARD)


def cast_bytes(items: list[Item], setup: Setup = PLAIN) -> list[int]:
    return [
        item.read_bytes
        for item in with_casts(items, setup, "layers")
        if isinstance(item, Op) and item.name == CAST
    ]


@pytest.mark.parametrize(
    ("scaling", "forward", "backward"),
    [
        (Scaling.DELAYED, 4 * (64 * 32 + 32 * 16), 2 * 16 * 64),
        (Scaling.TENSORWISE, 5 * (64 * 32 + 32 * 16), 3.5 * 16 * 64 + 2 * 64 * 32),
        (Scaling.ROWWISE, 3 * (64 * 32 + 32 * 16), 4 * 16 * 64 + 5 * 64 * 32),
    ],
)
def test_both_matrices_are_cast_before_a_matmul_as_their_scales_need(
    scaling: Scaling, forward: int, backward: float
) -> None:
    setup = Setup(matmul_dtype="float8", scaling=scaling)
    assert cast_bytes([FORWARD, BACKWARD], setup) == [forward, backward]


def test_what_several_matmuls_in_a_row_take_is_cast_once() -> None:
    once, again = cast_bytes([FORWARD, FORWARD])
    assert once - again == 5 * TOKENS * WIDE


def elementwise(*shape: int) -> Op:
    spec = TensorSpec("bfloat16", shape)
    return Op("aten::silu", OpKind.ELEMENTWISE, Phase.FORWARD, "layers.0", (spec,), (spec,), 0, 0, 0)


def test_a_swiglu_s_input_is_cast_once_though_its_silu_lies_between() -> None:
    once, again = cast_bytes([FORWARD, elementwise(TOKENS, OUT), FORWARD])
    assert once - again == 5 * TOKENS * WIDE


def test_what_has_the_shape_of_a_matrix_that_was_gathered_and_cast_is_another() -> None:
    inner = matmul((TOKENS, WIDE), (WIDE, WIDE))
    items: list[Item] = [gather(2 * TOKENS * WIDE, 4), inner, elementwise(TOKENS, WIDE), inner]
    first, second = cast_bytes(items)
    assert first == 5 * (TOKENS * WIDE // 4 + WIDE * WIDE)
    assert second == 5 * (TOKENS * WIDE + WIDE * WIDE)


def test_a_gathered_matrix_is_cast_by_each_rank_before_it_is_sent() -> None:
    whole, part = cast_bytes([FORWARD])[0], cast_bytes([gather(2 * TOKENS * WIDE, 4), FORWARD])[0]
    assert whole - part == 5 * TOKENS * WIDE * 3 // 4
    rows = Setup(matmul_dtype="float8", scaling=Scaling.ROWWISE)
    item = gather(2 * TOKENS * WIDE, 4)
    assert gathers_float8(item, PLAIN, "layers")
    assert not gathers_float8(item, rows, "layers")
    assert not gathers_float8(item, Setup(), "layers")
    assert not gathers_float8(gather(64, 4, "output"), PLAIN, "layers")
    weights = replace(item, call=replace(item.call, axis="fsdp"))
    delayed = Setup(matmul_dtype="float8", scaling=Scaling.DELAYED)
    assert [gathers_float8(weights, setup, "layers") for setup in (PLAIN, rows, delayed)] == [
        True,
        False,
        False,
    ]


def test_the_head_and_products_of_batches_stay_in_the_step_s_dtype() -> None:
    assert is_float8(FORWARD, PLAIN, "layers")
    head = matmul((TOKENS, WIDE), (WIDE, OUT), module="output")
    assert not is_float8(head, PLAIN, "layers")
    assert is_float8(head, PLAIN, None)
    assert not is_float8(matmul((TOKENS, WIDE), (WIDE, OUT), name="aten::bmm"), PLAIN, "layers")
    assert not is_float8(FORWARD, Setup(), "layers")
    assert list(with_casts([FORWARD, head], Setup(), "layers")) == [FORWARD, head]
