"""The kernels that calibrate times: one rank's, without collectives. Each is an op of the catalogue, at sizes that training meets.

A case makes its tensors when its turn comes and drops them after. Matmuls are timed in the three layouts of a linear layer (output: x w^T;
input's gradient: g w; weight's gradient: g^T x), on normally distributed numbers: zeros would draw less power and run faster. A case draws
them from a generator of its own, before its call is captured. On a CPU outputs are fresh, as a step's are: what the allocator takes from the
system and clears is in their time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.calibrate.clock import Timing, time_kernel
from shardwise.core.program import OpKind, TensorSpec
from shardwise.core.sample import Sample
from shardwise.torch_private import foreach_mul_, foreach_norm, fused_adamw_, softmax_backward
from shardwise.trace.catalogue import flops_of, kind_of, traffic_of

Call = Callable[[], object]
REPEATED = 1 << 18


@dataclass(frozen=True, slots=True)
class Work:
    """A call ready to be timed, with the tensors that it reads (as the op takes them), makes, and writes in place."""

    call: Call
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    written: tuple[Tensor, ...] = ()
    causal: bool = False
    graph: bool = True  # whether a CUDA graph can hold it


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to time. op: its name in the catalogue; variant: what sets it apart from others of that op."""

    op: str
    variant: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int  # that the case's tensors take, about
    make: Callable[[torch.device], Work]


def run_case(case: Case, device: torch.device) -> Sample:
    """Times one case. Raises RuntimeError where the device has no such kernel, or no memory for it."""
    return timed_case(case, device)[0]


def timed_case(case: Case, device: torch.device) -> tuple[Sample, Timing]:
    """run_case, and how its seconds came about."""
    work = case.make(device)
    timing = time_kernel(work.call, device, graph=work.graph)
    specs = [_spec(tensor) for tensor in work.inputs]
    made = [_spec(tensor) for tensor in work.outputs]
    read, write = traffic_of(case.op, specs, _sizes(work.inputs), _sizes(work.outputs), _sizes(work.written))
    sample = Sample(
        what=str(kind_of(case.op, "cpu")),
        name=f"{case.op} {case.variant}".strip(),
        dtype=case.dtype,
        shape=case.shape,
        seconds=timing.seconds,
        low_s=timing.low_s,
        high_s=timing.high_s,
        repeats=timing.repeats,
        flops=flops_of(case.op, specs, made, causal=work.causal)
        if kind_of(case.op, "cpu") in (OpKind.MATMUL, OpKind.ATTENTION)
        else 0,
        read_bytes=read,
        write_bytes=write,
    )
    return sample, timing


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _sizes(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def _randn(*shape: int, dtype: str, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    if device.type == "cpu" and prod(shape) > REPEATED:  # drawing would take longer than what is timed
        block = torch.randn(REPEATED, generator=generator).to(getattr(torch, dtype))
        return block.repeat(-(-prod(shape) // REPEATED))[: prod(shape)].view(shape)
    return torch.randn(*shape, dtype=getattr(torch, dtype), device=device, generator=generator)


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]


def matmul(m: int, n: int, k: int, dtype: str, layout: str) -> Case:
    """[m, k] x [k, n]. layout: tn = x w^T (a linear layer's output), nn = g w, nt = g^T x."""

    def make(device: torch.device) -> Work:
        a = _randn(*((k, m) if layout == "nt" else (m, k)), dtype=dtype, device=device)
        b = _randn(*((n, k) if layout == "tn" else (k, n)), dtype=dtype, device=device)
        left, right = a.T if layout == "nt" else a, b.T if layout == "tn" else b
        out = torch.empty(m, n, dtype=left.dtype, device=device)
        if device.type == "cpu":
            return Work(lambda: torch.mm(left, right), (left, right), (out,))
        return Work(lambda: torch.mm(left, right, out=out), (left, right), (out,))

    return Case("aten::mm", layout, dtype, (1, m, n, k), (m * k + n * k + m * n) * _width(dtype), make)


def batched_matmul(batch: int, m: int, n: int, k: int, dtype: str) -> Case:
    """[batch, m, k] x [batch, k, n]: attention without a fused kernel."""

    def make(device: torch.device) -> Work:
        a, b = (
            _randn(batch, m, k, dtype=dtype, device=device),
            _randn(batch, k, n, dtype=dtype, device=device),
        )
        out = torch.empty(batch, m, n, dtype=a.dtype, device=device)
        return Work(lambda: torch.bmm(a, b, out=out), (a, b), (out,))

    return Case(
        "aten::bmm", "nn", dtype, (batch, m, n, k), batch * (m * k + n * k + m * n) * _width(dtype), make
    )


def attention(
    batch: int, heads: int, kv_heads: int, seq: int, head_dim: int, dtype: str, *, backward: bool
) -> Case:
    """Causal scaled_dot_product_attention as PyTorch chooses its kernel, forward or backward."""

    def make(device: torch.device) -> Work:
        q = _randn(batch, heads, seq, head_dim, dtype=dtype, device=device).requires_grad_(backward)
        k, v = (
            _randn(batch, kv_heads, seq, head_dim, dtype=dtype, device=device).requires_grad_(backward)
            for _ in range(2)
        )

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

        out = forward()
        if not backward:
            return Work(forward, (q, k, v), (out,), causal=True, graph=False)
        grad = torch.randn_like(out)
        return Work(
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True),
            (grad, q, k, v, out),
            (q, k, v),
            causal=True,
            graph=False,
        )

    op = "aten::_scaled_dot_product_flash_attention" + ("_backward" if backward else "")
    n_bytes = 4 * batch * seq * head_dim * (2 * heads + 2 * kv_heads) * _width(dtype)
    return Case(op, "causal", dtype, (batch, heads, kv_heads, seq, head_dim), n_bytes, make)


def _unary(
    op: str, act: Callable[[Tensor], object], rows: int, width: int, dtype: str, variant: str = ""
) -> Case:
    def make(device: torch.device) -> Work:
        x = _randn(rows, width, dtype=dtype, device=device)
        out = act(x)
        outputs = out if isinstance(out, tuple) else (out,)
        return Work(lambda: act(x), (x,), tuple(each for each in outputs if isinstance(each, Tensor)))

    return Case(op, variant, dtype, (rows, width), 3 * rows * width * _width(dtype), make)


def _binary(
    op: str, act: Callable[[Tensor, Tensor], object], rows: int, width: int, dtype: str, variant: str = ""
) -> Case:
    def make(device: torch.device) -> Work:
        x, y = (_randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        out = act(x, y)
        return Work(lambda: act(x, y), (x, y), (out,) if isinstance(out, Tensor) else tuple(out))  # type: ignore[arg-type]

    return Case(op, variant, dtype, (rows, width), 5 * rows * width * _width(dtype), make)


def _layer_norm(rows: int, width: int, dtype: str, *, backward: bool) -> Case:
    def make(device: torch.device) -> Work:
        x, weight, bias = (
            _randn(*size, dtype=dtype, device=device) for size in ((rows, width), (width,), (width,))
        )
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, [width], weight, bias, 1e-5)
        if not backward:
            return Work(
                lambda: torch.ops.aten.native_layer_norm(x, [width], weight, bias, 1e-5),
                (x, weight, bias),
                (out, mean, rstd),
            )
        call = torch.ops.aten.native_layer_norm_backward
        return Work(
            lambda: call(out, x, [width], mean, rstd, weight, bias, [True, True, True]),
            (out, x, mean, rstd, weight, bias),
            (x, weight, bias),
        )

    op = "aten::native_layer_norm" + ("_backward" if backward else "")
    return Case(op, "", dtype, (rows, width), 4 * rows * width * _width(dtype), make)


def _rms_norm(rows: int, width: int, dtype: str, *, backward: bool) -> Case:
    def make(device: torch.device) -> Work:
        x, weight = _randn(rows, width, dtype=dtype, device=device), _randn(width, dtype=dtype, device=device)
        out, rstd = torch.ops.aten._fused_rms_norm(x, [width], weight, 1e-5)
        if not backward:
            return Work(
                lambda: torch.ops.aten._fused_rms_norm(x, [width], weight, 1e-5), (x, weight), (out, rstd)
            )
        call = torch.ops.aten._fused_rms_norm_backward
        return Work(
            lambda: call(out, x, [width], rstd, weight, [True, True]), (out, x, rstd, weight), (x, weight)
        )

    op = "aten::_fused_rms_norm" + ("_backward" if backward else "")
    return Case(op, "", dtype, (rows, width), 4 * rows * width * _width(dtype), make)


def _transpose_copy(batch: int, heads: int, seq: int, head_dim: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        x = _randn(batch, heads, seq, head_dim, dtype=dtype, device=device).transpose(1, 2)
        out = torch.empty(x.shape, dtype=x.dtype, device=device)
        return Work(lambda: out.copy_(x), (out, x), (), (out,))

    n_bytes = 2 * batch * heads * seq * head_dim * _width(dtype)
    return Case("aten::copy_", "transposed", dtype, (batch, heads, seq, head_dim), n_bytes, make)


def _cast(n: int, source: str, target: str) -> Case:
    def make(device: torch.device) -> Work:
        x = _randn(n, dtype=source, device=device)
        out = torch.empty(n, dtype=getattr(torch, target), device=device)
        return Work(lambda: out.copy_(x), (out, x), (), (out,))

    return Case("aten::copy_", f"to {target}", source, (n,), n * (_width(source) + _width(target)), make)


def _in_place(op: str, act: Callable[[Tensor, Tensor], object], n: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        x, y = (
            _randn(n, dtype=dtype, device=device),
            torch.zeros(n, dtype=getattr(torch, dtype), device=device),
        )
        return Work(lambda: act(x, y), (x, y), (), (x,))

    return Case(op, "", dtype, (n,), 3 * n * _width(dtype), make)


def _fill(n: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        out = torch.empty(n, dtype=getattr(torch, dtype), device=device)
        return Work(out.zero_, (out,), (), (out,))

    return Case("aten::zero_", "", dtype, (n,), n * _width(dtype), make)


def _fresh_zeros(n: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        like = torch.empty(n, dtype=getattr(torch, dtype), device=device)
        return Work(lambda: torch.zeros_like(like), (like,), (like,))

    return Case("aten::zeros_like", "", dtype, (n,), 2 * n * _width(dtype), make)


def embedding(rows: int, width: int, ids: int, dtype: str, *, hit: str, backward: bool = False) -> Case:
    """Look-ups of `ids` rows in a table [rows, width]. hit: "any" row, or "one": 7 of 8 ids are row 0, as a masked look-up's are."""

    def make(device: torch.device) -> Work:
        table = _randn(rows, width, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        chosen = torch.randint(rows, (ids,), device=device, generator=generator)
        if hit == "one":
            chosen[torch.rand(ids, device=device, generator=generator) < 0.875] = 0
        out = F.embedding(chosen, table)
        if not backward:
            return Work(lambda: torch.index_select(table, 0, chosen, out=out), (table, chosen), (out,))
        call = torch.ops.aten.embedding_dense_backward
        return Work(lambda: call(out, chosen, rows, -1, False), (out, chosen), (table,))

    op = "aten::embedding" + ("_dense_backward" if backward else "")
    return Case(
        op, f"{hit} row", dtype, (rows, width, ids), (2 * rows + 2 * ids) * width * _width(dtype), make
    )


def row_look_up(rows: int, width: int, ids: int, dtype: str) -> Case:
    """index_select as the native engine's embeddings look rows up."""

    def make(device: torch.device) -> Work:
        table = _randn(rows, width, dtype=dtype, device=device)
        chosen = torch.randint(rows, (ids,), device=device, generator=torch.Generator(device).manual_seed(0))
        out = table.index_select(0, chosen)
        return Work(lambda: table.index_select(0, chosen), (table, chosen), (out,))

    return Case(
        "aten::index_select", "", dtype, (rows, width, ids), (rows + ids) * width * _width(dtype), make
    )


def row_adding(rows: int, width: int, ids: int, dtype: str) -> Case:
    """index_add_ of `ids` rows to a table's gradient."""

    def make(device: torch.device) -> Work:
        table, source = (
            _randn(rows, width, dtype=dtype, device=device),
            _randn(ids, width, dtype=dtype, device=device),
        )
        chosen = torch.randint(rows, (ids,), device=device, generator=torch.Generator(device).manual_seed(0))
        return Work(lambda: table.index_add_(0, chosen, source), (table, chosen, source), (), (table,))

    return Case("aten::index_add_", "", dtype, (rows, width, ids), (rows + ids) * width * _width(dtype), make)


def log_softmax(rows: int, width: int, dtype: str) -> Case:
    """Of a head's logits."""
    return _unary("aten::_log_softmax", lambda x: torch.log_softmax(x, -1), rows, width, dtype)


def softmax(rows: int, width: int, dtype: str) -> Case:
    return _unary("aten::_softmax", lambda x: torch.softmax(x, -1), rows, width, dtype)


def _index_copy(rows: int, width: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        out, source = (_randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        where = torch.randperm(rows, device=device, generator=torch.Generator(device).manual_seed(0))
        return Work(lambda: out.index_copy_(0, where, source), (out, where, source), (), (out,))

    return Case("aten::index_copy_", "", dtype, (rows, width), 2 * rows * width * _width(dtype), make)


def _adamw(n: int, dtype: str, tensors: int) -> Case:
    def make(device: torch.device) -> Work:
        params, grads, firsts, seconds = (
            [_randn(n // tensors, dtype=dtype, device=device).abs_() for _ in range(tensors)]
            for _ in range(4)
        )
        steps = [torch.ones((), device=device) for _ in range(tensors)]

        def call() -> None:
            fused_adamw_(
                params, grads, firsts, seconds, [], steps,
                lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

        return Work(call, (*params, *grads, *firsts, *seconds), (), (*params, *firsts, *seconds))

    return Case("aten::_fused_adamw_", f"{tensors} tensors", dtype, (n,), 4 * n * _width(dtype), make)


def _norm_of_all(n: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        parts = [_randn(n // 4, dtype=dtype, device=device) for _ in range(4)]
        return Work(lambda: foreach_norm(parts, 2.0), tuple(parts), ())

    return Case("aten::_foreach_norm", "", dtype, (n,), n * _width(dtype), make)


def _scale_all(n: int, dtype: str) -> Case:
    def make(device: torch.device) -> Work:
        parts = [_randn(n // 4, dtype=dtype, device=device) for _ in range(4)]
        scale = torch.ones((), device=device, dtype=parts[0].dtype)
        return Work(lambda: foreach_mul_(parts, scale), tuple(parts), (), tuple(parts))

    return Case("aten::_foreach_mul_", "", dtype, (n,), n * _width(dtype), make)


def memory_bound(n: int, width: int, dtype: str) -> Iterator[Case]:
    """Ops of every kind that memory bounds, on tensors of n elements in rows of `width`."""
    rows = max(1, n // width)
    yield _unary("aten::clone", torch.clone, rows, width, dtype)
    yield _binary("aten::add", torch.add, rows, width, dtype)
    yield _binary("aten::sub", torch.sub, rows, width, dtype)
    yield _binary("aten::mul", torch.mul, rows, width, dtype)
    yield _in_place("aten::add_", Tensor.add_, n, dtype)
    yield _in_place("aten::mul_", Tensor.mul_, n, dtype)
    yield _unary("aten::exp", torch.exp, rows, width, dtype)
    yield _unary("aten::neg", torch.neg, rows, width, dtype)
    yield _unary("aten::pow", lambda x: x.pow(2), rows, width, dtype)
    yield _unary("aten::div", lambda x: x / 3.0, rows, width, dtype)
    yield _unary("aten::silu", F.silu, rows, width, dtype)
    yield _unary("aten::gelu", F.gelu, rows, width, dtype)
    yield _binary("aten::silu_backward", torch.ops.aten.silu_backward, rows, width, dtype)
    yield _binary("aten::gelu_backward", torch.ops.aten.gelu_backward, rows, width, dtype)
    yield _binary("aten::cat", lambda x, y: torch.cat((x, y), -1), rows, width // 2, dtype)
    yield _unary("aten::sum", lambda x: x.sum(-1), rows, width, dtype, "last dim")
    yield _unary("aten::sum", lambda x: x.sum(0), rows, width, dtype, "first dim")
    yield _unary("aten::mean", lambda x: x.mean(-1, keepdim=True), rows, width, dtype)
    yield _unary("aten::amax", lambda x: x.amax(-1), rows, width, dtype)
    yield _unary("aten::_softmax", lambda x: torch.softmax(x, -1), rows, width, dtype)
    yield _binary(
        "aten::_softmax_backward_data", lambda x, y: softmax_backward(x, y, -1, x.dtype), rows, width, dtype
    )
    yield _layer_norm(rows, width, dtype, backward=False)
    yield _layer_norm(rows, width, dtype, backward=True)
    yield _rms_norm(rows, width, dtype, backward=False)
    yield _rms_norm(rows, width, dtype, backward=True)
    yield _fill(n, dtype)
    yield _fresh_zeros(n, dtype)
    yield _cast(n, dtype, "float32" if dtype != "float32" else "bfloat16")
    yield _index_copy(rows, width, dtype)
    yield _norm_of_all(n, dtype)
    yield _scale_all(n, dtype)
    yield _adamw(n, dtype, 4)
    if width >= 128:
        yield _transpose_copy(1, width // 64, max(1, n // width), 64, dtype)
