"""Collectives on plain local tensors, without a gradient: what the differentiable ones (collectives.py) are
made of. Each says who wants it while it runs (issuing.py); on one rank none sends anything.

begin_shift() sends to the next rank round the axis and takes from the one before. All ranks of the axis must
call in the same order. Sizes: where chunks differ, a gather pads on the wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.core.collective import CollectiveKind, Origin
from shardwise.parallel.axis import Axis
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.issuing import Issue, Sends, issued, labelled

# the old names warn since 2.13
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
    with labelled(CollectiveKind.ALL_GATHER, origin):
        all_gather_into(parts.view(-1), x.contiguous().view(-1), group=axis.group)
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
    with labelled(CollectiveKind.REDUCE_SCATTER, origin):
        reduce_scatter_into(out.view(-1), blocks.view(-1), group=axis.group)
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
        with labelled(CollectiveKind.ALL_REDUCE, origin):
            dist.all_reduce(x, group=axis.group)
    return x


def sum_over_now(x: Tensor, group: dist.ProcessGroup, origin: Origin, reason: str) -> None:
    """All-reduce in place over a group that is no one axis', without a gradient. reason: see Issue."""
    with issued(CollectiveKind.ALL_REDUCE, Issue(origin, by_data=False, reason=reason)):
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
    with issued(CollectiveKind.ALL_TO_ALL, issue):
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
    with labelled(CollectiveKind.SEND, origin):
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=axis.group, group_peer=after),
                dist.P2POp(dist.irecv, received, group=axis.group, group_peer=before),
            ]
        )
    return Shift(received, sent, tuple(works))


def swap_dims(
    x: Tensor, split_dim: int, concat_dim: int, concat_size: int, axis: Axis, origin: Origin
) -> Tensor:
    """Shard(concat_dim) -> Shard(split_dim), without a gradient; `concat_size` is the whole size of
    concat_dim."""
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
