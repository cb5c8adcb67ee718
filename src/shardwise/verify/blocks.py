"""One tensor, several relations: of a weight in which several things lie, some rows (or columns) may be whole
on every rank and others parts that nobody sums, or a multiple."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

MOST_SAME = 1e-6
"""How far apart the multiples of two rows may be to count as one."""


@dataclass(frozen=True, slots=True)
class Block:
    """Slices [start, stop) along a dim. is_part: the ranks' sum is the whole. factor: each rank has so many
    times the whole; both unset: each has the whole."""

    start: int
    stop: int
    is_part: bool = False
    factor: float | None = None

    @property
    def is_whole(self) -> bool:
        return not self.is_part and self.factor is None


def blocks_of(held: Sequence[Tensor], whole: Tensor, *, bound: float) -> tuple[int, tuple[Block, ...]] | None:
    """(dim, blocks) along the dim that tells the fewest, in order; None where some slice is neither whole,
    nor a part, nor one multiple. held: as large as the whole, in its dtype. bound: how far a slice may be
    off, absolute."""
    found = [
        (dim, blocks)
        for dim in range(whole.dim())
        if whole.shape[dim] > 1 and (blocks := _along(held, whole, dim, bound))
    ]
    return min(found, key=lambda pair: len(pair[1]), default=None)


def _along(held: Sequence[Tensor], whole: Tensor, dim: int, bound: float) -> tuple[Block, ...]:
    expected = _rows(whole, dim)
    pieces = torch.stack([_rows(each, dim) for each in held])
    is_whole = ((pieces - expected).norm(dim=2) <= bound).all(0)
    is_part = (pieces.sum(0) - expected).norm(dim=1) <= bound if len(held) > 1 else is_whole
    factors = _factors(pieces, expected, bound)
    others = factors[~(is_whole | is_part)]
    if bool(others.isnan().any()) or not bool(is_whole.any()) or bool(is_whole.all()):
        return ()
    if len(others) and float(others.max() - others.min()) > MOST_SAME:
        return ()
    factor = float(others.mean()) if len(others) else None
    kinds = [
        (False, None) if whole_here else (True, None) if part else (False, factor)
        for whole_here, part in zip(is_whole.tolist(), is_part.tolist(), strict=True)
    ]
    blocks, start = [], 0
    for (part, times), run in groupby(kinds):
        stop = start + len(list(run))
        blocks.append(Block(start, stop, part, times))
        start = stop
    return tuple(blocks)


def _factors(pieces: Tensor, expected: Tensor, bound: float) -> Tensor:
    """Of each row, how many times the whole every rank has; NaN where that is no one number."""
    squares = expected.square().sum(1)
    factors = (pieces[0] * expected).sum(1) / squares
    off = (pieces - factors.unsqueeze(1) * expected).norm(dim=2).amax(0)
    return torch.where((off <= bound) & (squares > 0), factors, torch.nan)


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
