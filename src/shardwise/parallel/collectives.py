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

begin_shift() sends to the next rank round the axis and takes from the one before; who calls it sees to its
gradient.

All ranks of the axis must call in the same order. Sizes: a sharded dim is cut as torch.chunk cuts it; where
chunks differ, all_gather and split pad on the wire. With an active profiler each collective is a range named
`shardwise.KIND|ORIGIN`; a tracer below, at the dispatcher, asks `issuing()` who wants the collective that it
sees.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.core.collective import CollectiveKind, Origin
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel.axis import Axis
from shardwise.torch_private import is_profiling

# the old names warn since 2.13
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Sends:
    """What a rank sends to others where a router decides: at most, whatever it chose, and on average. In
    rows, or in bytes."""

    most: int
    mean: float


@dataclass(frozen=True, slots=True)
class Issue:
    """A collective that is being issued: for whom, and whether its splits depend on the data, not on shapes
    alone. sends: in bytes, where token ids alone don't tell. reason: why, where the placements don't say
    it."""

    origin: Origin
    by_data: bool
    sends: Sends | None = None
    reason: str | None = None


_issuing: ContextVar[Issue | None] = ContextVar("issuing", default=None)


def issuing() -> Issue | None:
    """The native engine's collective that runs now, in this thread; None outside of one."""
    return _issuing.get()


def chunk_sizes(size: int, parts: int) -> list[int]:
    """Sizes of `parts` chunks of `size` as torch.chunk and DTensor cut: all ceil(size/parts) but the last
    ones, which may be empty."""
    full = -(-size // parts)
    return [max(0, min(full, size - full * part)) for part in range(parts)]


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


def gather_now(x: Tensor, dim: int, axis: Axis, full_size: int, origin: Origin) -> Tensor:
    """All-gather without a gradient."""
    if axis.size == 1:
        return x
    sizes = chunk_sizes(full_size, axis.size)
    if x.shape[dim] != sizes[axis.rank]:
        raise AssertionError(
            f"{origin}: dim {dim} has {x.shape[dim]}, its shard of {full_size} has {sizes[axis.rank]}"
        )
    largest = sizes[0]
    if x.shape[dim] != largest:
        x = torch.cat((x, x.new_zeros(*x.shape[:dim], largest - x.shape[dim], *x.shape[dim + 1 :])), dim)
    parts = x.new_empty(axis.size, *x.shape)
    with _labelled(CollectiveKind.ALL_GATHER, origin):
        _all_gather_into(parts.view(-1), x.contiguous().view(-1), group=axis.group)
    full = parts.movedim(0, dim).flatten(dim, dim + 1)
    return full if largest * axis.size == full_size else full.narrow(dim, 0, full_size)


def scatter_sum_now(x: Tensor, dim: int, axis: Axis, origin: Origin) -> Tensor:
    """Reduce-scatter without a gradient."""
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise AssertionError(f"{origin}: dim {dim} has {x.shape[dim]}, no multiple of {axis.size}")
    blocks = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0)
    if axis.pairwise_reduce_scatter:
        return _sum_pairwise(blocks, axis, origin)
    blocks = blocks.contiguous()
    out = torch.empty_like(blocks[0])
    with _labelled(CollectiveKind.REDUCE_SCATTER, origin):
        _reduce_scatter_into(out.view(-1), blocks.view(-1), group=axis.group)
    return out


def _sum_pairwise(blocks: Tensor, axis: Axis, origin: Origin) -> Tensor:
    """Sum over ranks of the block that is this rank's: an all-to-all of the others', and a local sum. The own
    block isn't moved."""
    others = [blocks[rank] for rank in range(axis.size) if rank != axis.rank]
    received = swap_others_now(
        torch.stack(others) if len(others) > 1 else others[0].unsqueeze(0), axis, origin
    )
    if axis.size == 2:
        return torch.add(blocks[axis.rank], received[0])
    return received.sum(0).add_(blocks[axis.rank])


def sum_now(x: Tensor, axis: Axis, origin: Origin) -> Tensor:
    """All-reduce in place, without a gradient."""
    if axis.size > 1:
        with _labelled(CollectiveKind.ALL_REDUCE, origin):
            dist.all_reduce(x, group=axis.group)
    return x


def sum_over_now(x: Tensor, group: dist.ProcessGroup, origin: Origin, reason: str) -> None:
    """All-reduce in place over a group that is no one axis', without a gradient. reason: see Issue."""
    with _issued(CollectiveKind.ALL_REDUCE, Issue(origin, by_data=False, reason=reason)):
        dist.all_reduce(x, group=group)


def swap_others_now(blocks: Tensor, axis: Axis, origin: Origin) -> Tensor:
    """[n - 1, ...], a block for every other rank in order -> [n - 1, ...], one from every other rank in
    order; no gradient."""
    splits = [int(rank != axis.rank) for rank in range(axis.size)]
    return swap_rows_now(blocks, splits, splits, axis, origin)


def swap_rows_now(
    rows: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    axis: Axis,
    origin: Origin,
    *,
    by_data: bool = False,
    sends: Sends | None = None,
    reason: str | None = None,
) -> Tensor:
    """exchange_rows without a gradient. by_data: the splits come from the batch, not from shapes. sends: rows
    for Issue.sends. reason: see Issue."""
    received = rows.new_empty(sum(receive_splits), *rows.shape[1:])
    if axis.size == 1:
        return received.copy_(rows)
    row_bytes = rows.element_size() * rows.shape[1:].numel()
    in_bytes = Sends(sends.most * row_bytes, sends.mean * row_bytes) if sends is not None else None
    issue = Issue(origin, by_data, in_bytes, reason)
    with _issued(CollectiveKind.ALL_TO_ALL, issue):
        dist.all_to_all_single(
            received, rows.contiguous(), list(receive_splits), list(send_splits), group=axis.group
        )
    return received


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """A tensor that is on its way to the next rank of the axis, while the previous one's comes."""

    received: Tensor
    sent: Tensor  # alive until it is
    works: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        """What has come; what was sent may be changed from now on."""
        for work in self.works:
            work.wait()
        return self.received


def begin_shift(x: Tensor, axis: Axis, origin: Origin) -> Shift:
    """Sends x to the next rank round the axis and takes a tensor of its shape from the one before; no
    gradient. All ranks call it, two or more."""
    sent = x.contiguous()
    received = torch.empty_like(sent)
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    with _labelled(CollectiveKind.SEND, origin):
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=axis.group, group_peer=after),
                dist.P2POp(dist.irecv, received, group=axis.group, group_peer=before),
            ]
        )
    return Shift(received, sent, tuple(works))


def _swap_dims(
    x: Tensor, split_dim: int, concat_dim: int, concat_size: int, axis: Axis, origin: Origin
) -> Tensor:
    """Shard(concat_dim) -> Shard(split_dim); `concat_size` is the whole size of concat_dim."""
    if axis.size == 1:
        return x
    parts = x.split(chunk_sizes(x.shape[split_dim], axis.size), split_dim)
    sends = [part.numel() for part in parts]
    flat = torch.cat([part.reshape(-1) for part in parts])
    own = chunk_sizes(x.shape[split_dim], axis.size)[axis.rank]
    shapes = []
    for size in chunk_sizes(concat_size, axis.size):
        shape = list(x.shape)
        shape[split_dim], shape[concat_dim] = own, size
        shapes.append(shape)
    receives = [torch.Size(shape).numel() for shape in shapes]
    received = swap_rows_now(flat, sends, receives, axis, origin)
    return torch.cat(
        [part.view(shape) for part, shape in zip(received.split(receives), shapes, strict=True)], concat_dim
    )


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
            own = _own_chunk(grad, dim, axis)
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
        return _own_chunk(x, dim, axis)

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
        return _swap_dims(x, split_dim, concat_dim, full_size, axis, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        split_dim, concat_dim, split_size, axis, origin = ctx.saved
        turned = origin.turned(origin.after, origin.before)
        return _swap_dims(grad, concat_dim, split_dim, split_size, axis, turned), None, None, None, None, None


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


def _own_chunk(x: Tensor, dim: int, axis: Axis) -> Tensor:
    sizes = chunk_sizes(x.shape[dim], axis.size)
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


def _expect(given: Placement, allowed: Sequence[Placement], what: str) -> None:
    if given not in allowed:
        raise ValueError(f"{what}: grad_placement is {given}. Allowed: {', '.join(map(str, allowed))}.")


@contextmanager
def _labelled(kind: CollectiveKind, origin: Origin) -> Iterator[None]:
    with _issued(kind, Issue(origin, by_data=False)):
        yield


@contextmanager
def _issued(kind: CollectiveKind, issue: Issue) -> Iterator[None]:
    token = _issuing.set(issue)
    try:
        if is_profiling():
            # Kineto writes names as they are: a quote would break its JSON
            label = f"shardwise.{kind}|{issue.origin}".replace('"', "'")
            with torch.profiler.record_function(label):
                yield
        else:
            yield
    finally:
        _issuing.reset(token)
