"""Differentiable collectives on plain local tensors: each says what it does to a placement, and is told what
its gradient is.

`grad_placement` has no default: the backward of an all-gather is a reduce-scatter if the consumer's gradient
is Partial (each rank computed a part), and a slice if it is Replicate (each rank computed the whole); nothing
in the tensor tells which.

    function         before -> after         grad_placement   backward
    all_gather       Shard(d) -> Replicate   Partial          reduce_scatter
                                             Replicate        own slice
    reduce_scatter   Partial -> Shard(d)     Shard(d)         all_gather
    all_reduce       Partial -> Replicate    Replicate        nothing
    fan_out          Replicate -> Replicate  Partial          all_reduce
    split            Replicate -> Shard(d)   Shard(d)         all_gather
    all_to_all       Shard(i) -> Shard(j)    Shard(j)         all_to_all back
    exchange_rows    rows to their askers    Shard(0)         exchange_rows back

All ranks of the axis must call in the same order. Sizes: a sharded dim is cut as torch.chunk cuts it; where
chunks differ, all_gather and split pad on the wire. With an active profiler each collective is a range named
`shardwise.KIND|ORIGIN`; a tracer below, at the dispatcher, asks `issuing()` who wants the collective that it
sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.core.collective import Origin
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel.axis import Axis
from shardwise.parallel.chunks import own_chunk
from shardwise.parallel.exchanges import gather_now, scatter_sum_now, sum_now, swap_dims, swap_rows_now
from shardwise.parallel.issuing import Sends


def all_gather(
    x: Tensor, dim: int, axis: Axis, *, full_size: int, grad_placement: Placement, origin: Origin
) -> Tensor:
    """Shard(dim) -> Replicate; `full_size` is the whole size of `dim`."""
    _expect(grad_placement, (Partial(), Replicate()), "all_gather")
    out: Tensor = _AllGather.apply(x, dim % x.dim(), axis, full_size, grad_placement, origin)
    return out


def reduce_scatter(x: Tensor, dim: int, axis: Axis, *, grad_placement: Placement, origin: Origin) -> Tensor:
    """Partial -> Shard(dim); the size of `dim` must be a multiple of the axis."""
    _expect(grad_placement, (Shard(dim),), "reduce_scatter")
    out: Tensor = _ReduceScatter.apply(x, dim % x.dim(), axis, origin)
    return out


def all_reduce(x: Tensor, axis: Axis, *, grad_placement: Placement, origin: Origin) -> Tensor:
    """Partial -> Replicate."""
    _expect(grad_placement, (Replicate(),), "all_reduce")
    out: Tensor = _AllReduce.apply(x, axis, origin)
    return out


def fan_out(x: Tensor, axis: Axis, *, grad_placement: Placement, origin: Origin) -> Tensor:
    """Replicate -> Replicate: does nothing forward; sums the parts of the gradient backward."""
    _expect(grad_placement, (Partial(),), "fan_out")
    out: Tensor = _FanOut.apply(x, axis, origin)
    return out


def split(x: Tensor, dim: int, axis: Axis, *, grad_placement: Placement, origin: Origin) -> Tensor:
    """Replicate -> Shard(dim), a view of the own chunk; the gradient is gathered whole."""
    _expect(grad_placement, (Shard(dim),), "split")
    out: Tensor = _Split.apply(x, dim % x.dim(), axis, origin)
    return out


def all_to_all(
    x: Tensor,
    split_dim: int,
    concat_dim: int,
    axis: Axis,
    *,
    full_size: int,
    grad_placement: Placement,
    origin: Origin,
) -> Tensor:
    """Shard(concat_dim) -> Shard(split_dim): cuts split_dim (any size), joins concat_dim, whose whole size is
    `full_size`."""
    _expect(grad_placement, (Shard(split_dim),), "all_to_all")
    out: Tensor = _AllToAll.apply(x, split_dim % x.dim(), concat_dim % x.dim(), full_size, axis, origin)
    return out


def exchange_rows(
    rows: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    axis: Axis,
    *,
    grad_placement: Placement,
    origin: Origin,
    sends: tuple[Sends, Sends] | None = None,
    reasons: tuple[str, str] | None = None,
) -> Tensor:
    """[sum(send_splits), H], sorted by destination -> [sum(receive_splits), H], sorted by source. sends:
    rows for Issue.sends, in the forward and in the backward; reasons: for Issue.reason, likewise."""
    _expect(grad_placement, (Shard(0),), "exchange_rows")
    told = tuple(zip(sends or (None, None), reasons or (None, None), strict=True))
    out: Tensor = _ExchangeRows.apply(rows, tuple(send_splits), tuple(receive_splits), axis, origin, told)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, axis: Axis, full_size: int, grad_placement: Placement, origin: Origin
    ) -> Tensor:
        ctx.saved = (dim, axis, grad_placement, origin)
        return gather_now(x, dim, axis, full_size, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dim, axis, grad_placement, origin = ctx.saved
        if grad_placement == Partial():
            own = scatter_sum_now(grad, dim, axis, origin.turned(Partial(), origin.before))
        else:
            own = own_chunk(grad, dim, axis)
        return own, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis, origin: Origin) -> Tensor:
        ctx.saved = (dim, axis, x.shape[dim], origin)
        return scatter_sum_now(x, dim, axis, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dim, axis, full_size, origin = ctx.saved
        whole = gather_now(grad, dim, axis, full_size, origin.turned(origin.after, Replicate()))
        return whole, None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, origin: Origin) -> Tensor:
        return sum_now(x.clone(memory_format=torch.contiguous_format), axis, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, origin: Origin) -> Tensor:
        ctx.saved = (axis, origin)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        axis, origin = ctx.saved
        turned = origin.turned(Partial(), Replicate())
        return sum_now(grad.clone(memory_format=torch.contiguous_format), axis, turned), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis, origin: Origin) -> Tensor:
        ctx.saved = (dim, axis, x.shape[dim], origin)
        return own_chunk(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dim, axis, full_size, origin = ctx.saved
        whole = gather_now(grad, dim, axis, full_size, origin.turned(origin.after, Replicate()))
        return whole, None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, split_dim: int, concat_dim: int, full_size: int, axis: Axis, origin: Origin
    ) -> Tensor:
        ctx.saved = (split_dim, concat_dim, x.shape[split_dim], axis, origin)
        return swap_dims(x, split_dim, concat_dim, full_size, axis, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        split_dim, concat_dim, split_size, axis, origin = ctx.saved
        turned = origin.turned(origin.after, origin.before)
        return swap_dims(grad, concat_dim, split_dim, split_size, axis, turned), None, None, None, None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_splits: Any, receive_splits: Any, axis: Axis, origin: Origin, told: Any
    ) -> Tensor:
        (sends, reason), back = told
        ctx.saved = (send_splits, receive_splits, axis, origin, back)
        return swap_rows_now(
            rows, send_splits, receive_splits, axis, origin, by_data=True, sends=sends, reason=reason
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        send_splits, receive_splits, axis, origin, (sends, reason) = ctx.saved
        turned = origin.turned(origin.after, origin.before)
        back = swap_rows_now(
            grad, receive_splits, send_splits, axis, turned, by_data=True, sends=sends, reason=reason
        )
        return back, None, None, None, None, None


def _expect(given: Placement, allowed: Sequence[Placement], what: str) -> None:
    if given not in allowed:
        raise ValueError(f"{what}: grad_placement is {given}. Allowed: {', '.join(map(str, allowed))}.")
