"""Where a rank's part of a tensor lies in the whole one, in the model's own order.

A part is, along each dim, some positions of the whole: one run of neighbours for a DTensor's shard, several
for a weight whose pieces are cut each by itself, every t-th row of an interleaved table. A Place is that as
numbers: for each dim its runs (first, count, step). The part is the whole at the product of its positions.

What cuts a tensor: the order in which a plan keeps it (parallel/ownership.py), then each axis of the
DTensor's mesh, from left to right, as torch.chunk cuts; what FSDP2 cuts comes last, for it cuts what the
others left.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor import Shard as TorchShard

from shardwise.core.errors import CheckpointError
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.ownership import Order
from shardwise.torch_private import StridedShard

Run = tuple[int, int, int]
Place = tuple[tuple[Run, ...], ...]
Positions = range | NDArray[np.int64]
"""Ascending or not, each once."""
Index = slice | NDArray[np.int64]


def place_of(name: str, tensor: Tensor, order: Order | None = None) -> Place:
    """Of this rank's local part. order: in which the tensor is kept, if not in its own. Raises
    CheckpointError where its placements don't tell."""
    if not isinstance(tensor, DTensor):
        return tuple(runs_of(range(size)) for size in tensor.shape)
    found = [_kept(size, dim, order) for dim, size in enumerate(tensor.shape)]
    for axis in _in_order_of_cutting(tensor):
        placement = tensor.placements[axis]
        if placement.is_partial():
            raise CheckpointError(f"checkpoint: {name} is Partial over its mesh. Sum it before it is saved.")
        if isinstance(placement, TorchShard | StridedShard):
            pieces = _split_factor(placement) if _is_alone(tensor, axis) else 1
            size, rank = tensor.device_mesh.size(axis), tensor.device_mesh.get_local_rank(axis)
            found[placement.dim] = _chunk(found[placement.dim], size, rank, pieces)
    local = tensor.to_local()
    if tuple(map(len, found)) != tuple(local.shape):
        raise CheckpointError(
            f"checkpoint: a rank holds {list(local.shape)} of {name}, and by its placements "
            f"{tensor.placements} it would be {list(map(len, found))}. Use a plan that cuts it evenly."
        )
    return tuple(map(runs_of, found))


def _kept(size: int, dim: int, order: Order | None) -> Positions:
    if order is None or order.dim != dim:
        return range(size)
    return np.concatenate([order.ids_of(rank).numpy() for rank in range(order.axis_size)])


def _in_order_of_cutting(tensor: DTensor) -> list[int]:
    """Axes of its mesh; FSDP2's last."""

    def cut_after_others(axis: int) -> bool:
        return isinstance(tensor.placements[axis], StridedShard) and not _is_alone(tensor, axis)

    return sorted(range(tensor.device_mesh.ndim), key=cut_after_others)


def _is_alone(tensor: DTensor, axis: int) -> bool:
    """Whether a strided shard is one of pieces, each cut by itself, rather than a cut of what axes to its
    right have left."""
    placement = tensor.placements[axis]
    if not isinstance(placement, StridedShard):
        return False
    others = math.prod(
        tensor.device_mesh.size(other)
        for other in range(axis + 1, tensor.device_mesh.ndim)
        if isinstance(each := tensor.placements[other], TorchShard | StridedShard)
        and each.dim == placement.dim
    )
    return others != _split_factor(placement)


def _split_factor(placement: TorchPlacement) -> int:
    return int(getattr(placement, "split_factor", 1))


def _chunk(positions: Positions, parts: int, rank: int, pieces: int) -> Positions:
    """The rank's chunk of each of so many pieces."""
    found, start = [], 0
    for piece in chunk_sizes(len(positions), pieces):
        sizes = chunk_sizes(piece, parts)
        first = start + sum(sizes[:rank])
        found.append(positions[first : first + sizes[rank]])
        start += piece
    return found[0] if pieces == 1 else np.concatenate([as_array(each) for each in found])


def runs_of(positions: Positions) -> tuple[Run, ...]:
    """The fewest that a walk from the front finds."""
    if isinstance(positions, range):
        return ((positions.start, len(positions), positions.step),) if positions else ()
    if not len(positions):
        return ()
    steps = np.diff(positions)
    # where the distance to the next position isn't that of the one before
    turns = (np.flatnonzero(np.diff(steps)) + 1).tolist()
    found, start, last = [], 0, len(positions) - 1
    for turn in (*turns, last):
        if turn <= start:
            continue  # the distance between two runs is a turn too
        assert steps[start] > 0, "positions ascend"
        found.append((int(positions[start]), turn - start + 1, int(steps[start])))
        start = turn + 1
    if start <= last:
        found.append((int(positions[start]), 1, 1))
    return tuple(found)


def positions_in(runs: Sequence[Run]) -> Positions:
    """What runs_of() made runs of."""
    made = [range(first, first + count * step, step) for first, count, step in runs]
    if len(made) < 2:
        return made[0] if made else range(0)
    return np.concatenate([as_array(each) for each in made])


def as_array(positions: Positions) -> NDArray[np.int64]:
    """One by one."""
    if isinstance(positions, range):
        return np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
    return positions


def sizes_of(place: Place) -> tuple[int, ...]:
    """The part's shape."""
    return tuple(sum(count for _, count, _ in runs) for runs in place)


def fits(place: Place, shape: Sequence[int]) -> bool:
    """Whether all of its positions are in a tensor of this shape, and runs are what runs_of() gives."""
    if len(place) != len(shape):
        return False
    return all(
        count >= 1 and step >= 1 and first >= 0 and first + (count - 1) * step < size
        for runs, size in zip(place, shape, strict=True)
        for first, count, step in runs
    )


def common(mine: Positions, theirs: Positions) -> tuple[Index, Index] | None:
    """What two parts have in common along a dim: where it is in each. None for nothing."""
    if isinstance(mine, range) and isinstance(theirs, range) and mine.step == theirs.step == 1:
        first, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
        if first >= stop:
            return None
        return (
            slice(first - mine.start, stop - mine.start),
            slice(first - theirs.start, stop - theirs.start),
        )
    _, in_mine, in_theirs = np.intersect1d(
        as_array(mine), as_array(theirs), assume_unique=True, return_indices=True
    )
    return (_plain(in_mine), _plain(in_theirs)) if len(in_mine) else None


def _plain(index: NDArray[np.int64]) -> Index:
    """A slice where it is one."""
    first, count = int(index[0]), len(index)
    return slice(first, first + count) if np.array_equal(index, np.arange(first, first + count)) else index
