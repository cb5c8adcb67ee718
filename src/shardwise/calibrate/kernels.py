"""The kernels that calibrate times: one rank's, without collectives. Each is an op of the catalogue, at sizes
that training meets.

Matmuls are timed in the three layouts of a linear layer (output: x w^T; input's gradient: g w; weight's
gradient: g^T x). On a CPU outputs are fresh, as a step's are: what the allocator takes from the system and
clears is in their time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.calibrate.case import Case, Draw, Make, Work
from shardwise.torch_private import foreach_mul_, foreach_norm, fused_adamw_, softmax_backward


def _case(op: str, variant: str, dtype: str, shape: tuple[int, ...], elements: int, make: Make) -> Case:
    """elements: of all the case's tensors, about."""
    return Case(f"aten::{op}", variant, dtype, shape, elements * _width(dtype), make)


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]


# matmuls and attention


def matmul(m: int, n: int, k: int, dtype: str, layout: str) -> Case:
    """[m, k] x [k, n]. layout: tn = x w^T (a linear layer's output), nn = g w, nt = g^T x."""

    def make(draw: Draw) -> Work:
        left = draw.normal(k, m).T if layout == "nt" else draw.normal(m, k)
        right = draw.normal(n, k).T if layout == "tn" else draw.normal(k, n)
        out = draw.empty(m, n)
        if draw.device.type == "cpu":
            return Work(lambda: torch.mm(left, right), (left, right), (out,))
        return Work(lambda: torch.mm(left, right, out=out), (left, right), (out,))

    return _case("mm", layout, dtype, (1, m, n, k), m * k + n * k + m * n, make)


def batched_matmul(batch: int, m: int, n: int, k: int, dtype: str) -> Case:
    """[batch, m, k] x [batch, k, n]: attention without a fused kernel."""

    def make(draw: Draw) -> Work:
        a, b, out = draw.normal(batch, m, k), draw.normal(batch, k, n), draw.empty(batch, m, n)
        return Work(lambda: torch.bmm(a, b, out=out), (a, b), (out,))

    return _case("bmm", "nn", dtype, (batch, m, n, k), batch * (m * k + n * k + m * n), make)


def attention(
    batch: int, heads: int, kv_heads: int, seq: int, head_dim: int, dtype: str, *, backward: bool
) -> Case:
    """Causal scaled_dot_product_attention as PyTorch chooses its kernel, forward or backward."""

    def make(draw: Draw) -> Work:
        q, k, v = (
            draw.normal(batch, each, seq, head_dim).requires_grad_(backward)
            for each in (heads, kv_heads, kv_heads)
        )

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

        out = forward()
        if not backward:
            return Work(forward, (q, k, v), (out,), causal=True, graph=False)
        grad = torch.randn_like(out)

        def call() -> object:
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        return Work(call, (grad, q, k, v, out), (q, k, v), causal=True, graph=False)

    op = "_scaled_dot_product_flash_attention" + ("_backward" if backward else "")
    elements = 4 * batch * seq * head_dim * (2 * heads + 2 * kv_heads)
    return _case(op, "causal", dtype, (batch, heads, kv_heads, seq, head_dim), elements, make)


# what memory bounds


def _fresh(
    op: str,
    act: Callable[..., object],
    rows: int,
    width: int,
    dtype: str,
    *,
    inputs: int = 1,
    variant: str = "",
) -> Case:
    """An op that makes its outputs of one or two tensors [rows, width]."""

    def make(draw: Draw) -> Work:
        tensors = tuple(draw.normal(rows, width) for _ in range(inputs))
        call = partial(act, *tensors)
        made = call()
        outputs = made if isinstance(made, tuple) else (made,)
        return Work(call, tensors, tuple(each for each in outputs if isinstance(each, Tensor)))

    return _case(op, variant, dtype, (rows, width), (2 * inputs + 1) * rows * width, make)


def _norm(op: str, rows: int, width: int, dtype: str, *, vectors: int, backward: bool) -> Case:
    """vectors: a weight, and a bias where there is one."""
    forward_op = getattr(torch.ops.aten, op)
    backward_op = getattr(torch.ops.aten, f"{op}_backward")

    def make(draw: Draw) -> Work:
        x, own = draw.normal(rows, width), [draw.normal(width) for _ in range(vectors)]
        forward = partial(forward_op, x, [width], *own, 1e-5)
        out, *statistics = forward()
        if not backward:
            return Work(forward, (x, *own), (out, *statistics))
        wanted = [True] * (1 + vectors)
        call = partial(backward_op, out, x, [width], *statistics, *own, wanted)
        return Work(call, (out, x, *statistics, *own), (x, *own))

    return _case(op + ("_backward" if backward else ""), "", dtype, (rows, width), 4 * rows * width, make)


def _transpose_copy(batch: int, heads: int, seq: int, head_dim: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        x = draw.normal(batch, heads, seq, head_dim).transpose(1, 2)
        out = draw.empty(*x.shape)
        return Work(lambda: out.copy_(x), (out, x), written=(out,))

    shape = (batch, heads, seq, head_dim)
    return _case("copy_", "transposed", dtype, shape, 2 * prod(shape), make)


def _cast(n: int, source: str, target: str) -> Case:
    def make(draw: Draw) -> Work:
        x = draw.normal(n)
        out = torch.empty(n, dtype=getattr(torch, target), device=draw.device)
        return Work(lambda: out.copy_(x), (out, x), written=(out,))

    return Case("aten::copy_", f"to {target}", source, (n,), n * (_width(source) + _width(target)), make)


def _in_place(op: str, act: Callable[[Tensor, Tensor], object], n: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        x, y = draw.normal(n), draw.empty(n).zero_()
        return Work(lambda: act(x, y), (x, y), written=(x,))

    return _case(op, "", dtype, (n,), 3 * n, make)


def _fill(n: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        out = draw.empty(n)
        return Work(out.zero_, (out,), written=(out,))

    return _case("zero_", "", dtype, (n,), n, make)


def _fresh_zeros(n: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        like = draw.empty(n)
        return Work(lambda: torch.zeros_like(like), (like,), (like,))

    return _case("zeros_like", "", dtype, (n,), 2 * n, make)


def log_softmax(rows: int, width: int, dtype: str) -> Case:
    """Of a head's logits."""
    return _fresh("_log_softmax", lambda x: torch.log_softmax(x, -1), rows, width, dtype)


def softmax(rows: int, width: int, dtype: str) -> Case:
    return _fresh("_softmax", lambda x: torch.softmax(x, -1), rows, width, dtype)


# rows of tables


def embedding(rows: int, width: int, ids: int, dtype: str, *, hit: str, backward: bool = False) -> Case:
    """Look-ups of `ids` rows in a table [rows, width]. hit: "any" row, or "one": 7 of 8 ids are row 0, as a
    masked look-up's are."""

    def make(draw: Draw) -> Work:
        table, generator = draw.normal(rows, width), draw.generator()
        chosen = torch.randint(rows, (ids,), device=draw.device, generator=generator)
        if hit == "one":
            chosen[torch.rand(ids, device=draw.device, generator=generator) < 0.875] = 0
        out = F.embedding(chosen, table)
        if not backward:
            return Work(lambda: torch.index_select(table, 0, chosen, out=out), (table, chosen), (out,))
        call = torch.ops.aten.embedding_dense_backward
        return Work(lambda: call(out, chosen, rows, -1, False), (out, chosen), (table,))

    op = "embedding" + ("_dense_backward" if backward else "")
    return _case(op, f"{hit} row", dtype, (rows, width, ids), (2 * rows + 2 * ids) * width, make)


def row_look_up(rows: int, width: int, ids: int, dtype: str) -> Case:
    """index_select as the native engine's embeddings look rows up."""

    def make(draw: Draw) -> Work:
        table, chosen = draw.normal(rows, width), draw.rows(ids, rows)
        out = table.index_select(0, chosen)
        return Work(lambda: table.index_select(0, chosen), (table, chosen), (out,))

    return _case("index_select", "", dtype, (rows, width, ids), (rows + ids) * width, make)


def row_adding(rows: int, width: int, ids: int, dtype: str) -> Case:
    """index_add_ of `ids` rows to a table's gradient."""

    def make(draw: Draw) -> Work:
        table, source, chosen = draw.normal(rows, width), draw.normal(ids, width), draw.rows(ids, rows)
        return Work(lambda: table.index_add_(0, chosen, source), (table, chosen, source), written=(table,))

    return _case("index_add_", "", dtype, (rows, width, ids), (rows + ids) * width, make)


def _index_copy(rows: int, width: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        out, source = draw.normal(rows, width), draw.normal(rows, width)
        where = torch.randperm(rows, device=draw.device, generator=draw.generator())
        return Work(lambda: out.index_copy_(0, where, source), (out, where, source), written=(out,))

    return _case("index_copy_", "", dtype, (rows, width), 2 * rows * width, make)


# what an optimizer does to many tensors at once


def _adamw(n: int, dtype: str, tensors: int) -> Case:
    def make(draw: Draw) -> Work:
        params, grads, firsts, seconds = (
            [draw.normal(n // tensors).abs_() for _ in range(tensors)] for _ in range(4)
        )
        steps = [torch.ones((), device=draw.device) for _ in range(tensors)]

        def call() -> None:
            fused_adamw_(
                params, grads, firsts, seconds, [], steps,
                lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

        written = (*params, *firsts, *seconds)
        return Work(call, (*params, *grads, *firsts, *seconds), written=written)

    return _case("_fused_adamw_", f"{tensors} tensors", dtype, (n,), 4 * n, make)


def _norm_of_all(n: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        parts = [draw.normal(n // 4) for _ in range(4)]
        return Work(lambda: foreach_norm(parts, 2.0), tuple(parts))

    return _case("_foreach_norm", "", dtype, (n,), n, make)


def _scale_all(n: int, dtype: str) -> Case:
    def make(draw: Draw) -> Work:
        parts = [draw.normal(n // 4) for _ in range(4)]
        scale = torch.ones((), device=draw.device, dtype=draw.dtype)
        return Work(lambda: foreach_mul_(parts, scale), tuple(parts), written=tuple(parts))

    return _case("_foreach_mul_", "", dtype, (n,), n, make)


def memory_bound(n: int, width: int, dtype: str) -> Iterator[Case]:
    """Ops of every kind that memory bounds, on tensors of n elements in rows of `width`."""
    rows = max(1, n // width)
    of_one = partial(_fresh, rows=rows, width=width, dtype=dtype)
    of_two = partial(_fresh, rows=rows, width=width, dtype=dtype, inputs=2)
    yield of_one("clone", torch.clone)
    yield of_two("add", torch.add)
    yield of_two("sub", torch.sub)
    yield of_two("mul", torch.mul)
    yield _in_place("add_", Tensor.add_, n, dtype)
    yield _in_place("mul_", Tensor.mul_, n, dtype)
    yield of_one("exp", torch.exp)
    yield of_one("neg", torch.neg)
    yield of_one("pow", lambda x: x.pow(2))
    yield of_one("div", lambda x: x / 3.0)
    yield of_one("silu", F.silu)
    yield of_one("gelu", F.gelu)
    yield of_two("silu_backward", torch.ops.aten.silu_backward)
    yield of_two("gelu_backward", torch.ops.aten.gelu_backward)
    yield _fresh("cat", lambda x, y: torch.cat((x, y), -1), rows, width // 2, dtype, inputs=2)
    yield of_one("sum", lambda x: x.sum(-1), variant="last dim")
    yield of_one("sum", lambda x: x.sum(0), variant="first dim")
    yield of_one("mean", lambda x: x.mean(-1, keepdim=True))
    yield of_one("amax", lambda x: x.amax(-1))
    yield softmax(rows, width, dtype)
    yield of_two("_softmax_backward_data", lambda x, y: softmax_backward(x, y, -1, x.dtype))
    for op, vectors in (("native_layer_norm", 2), ("_fused_rms_norm", 1)):
        for backward in (False, True):
            yield _norm(op, rows, width, dtype, vectors=vectors, backward=backward)
    yield _fill(n, dtype)
    yield _fresh_zeros(n, dtype)
    yield _cast(n, dtype, "float32" if dtype != "float32" else "bfloat16")
    yield _index_copy(rows, width, dtype)
    yield _norm_of_all(n, dtype)
    yield _scale_all(n, dtype)
    yield _adamw(n, dtype, 4)
    if width >= 128:
        yield _transpose_copy(1, width // 64, rows, 64, dtype)
