"""How the tensors that the ranks hold relate to the whole one of the unsharded model: equal, cut, parts of a
sum, a multiple, or none of these.

Each wrong reduction has a relation of its own, so the relation is the reason: where every rank has a part and
nobody sums them, the sum of what they have is the whole; where wholes were summed, each has n times it; a
shard of the wrong rank is right one place further.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from shardwise.verify.blocks import Block, blocks_of


class Relation(StrEnum):
    WHOLE = "whole"  # every rank has the whole
    SHARDED = "sharded"  # rank r has the r-th chunk along `dim`
    PARTS = "parts"  # the sum over the ranks is the whole
    MULTIPLE = "multiple"  # `factor` times one of the above
    SHIFTED = "shifted"  # rank r has the chunk of another rank
    ONE_OF_SEVERAL = "one of several"  # `factor` tensors lie in one, and rank r has the r-th chunk of each
    ADDED = "added"  # every rank has the sum of all ranks' chunks
    REORDERED = "reordered"  # the ranks have all slices of the whole along `dim`, in an order of their own
    BLOCKS = "blocks"  # of the slices along `dim` some are parts, or multiples, and others whole
    ZERO = "zero"  # zeros, where the whole isn't
    MISSING = "missing"  # some rank has none
    UNEQUAL = "unequal"  # as large as the whole, not equal over the ranks, and no parts of it
    OTHER = "other"  # none of these


Far = Callable[[Sequence[Tensor]], float]
"""Largest relative distance of what is held from what is expected, over the ranks."""


@dataclass(frozen=True, slots=True)
class Related:
    """error: relative to the whole, ||piece - expected|| / ||whole||, the largest over the ranks, under the
    relation found. blocks: see Relation.BLOCKS."""

    relation: Relation
    error: float
    dim: int | None = None
    factor: float | None = None
    blocks: tuple[Block, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether a tensor of a sharded model may be so: what one rank lacks another has, or all have all."""
        return self.relation in _RIGHT


_RIGHT = frozenset({Relation.WHOLE, Relation.SHARDED, Relation.REORDERED, Relation.ONE_OF_SEVERAL})


def relate(pieces: Sequence[Tensor | None], whole: Tensor, *, tolerance: float) -> Related:
    """pieces: one tensor a rank, by rank. All must be on one device; they are compared in float64, with
    errors relative to the whole's norm."""
    whole = whole.double()
    norm = float(whole.norm())
    scale = norm or 1.0
    held = [piece.double() for piece in pieces if piece is not None]
    if len(held) < len(pieces):
        return Related(Relation.MISSING, float("inf"))

    def far(expected: Sequence[Tensor]) -> float:
        errors = [float((piece - part).norm()) / scale for piece, part in zip(held, expected, strict=True)]
        return max(float("inf") if error != error else error for error in errors)

    shapes = {tuple(piece.shape) for piece in held}
    if shapes == {tuple(whole.shape)}:
        return _relate_whole(held, whole, far, scale=scale, tolerance=tolerance)
    dim = cut_dim([piece.shape for piece in held], whole.shape)
    if dim is None:
        return Related(Relation.OTHER, float("inf"))
    return _relate_cut(held, whole, dim, far, tolerance=tolerance, is_zero=norm <= tolerance * scale)


def _relate_whole(held: list[Tensor], whole: Tensor, far: Far, *, scale: float, tolerance: float) -> Related:
    n = len(held)
    error = far([whole] * n)
    if error <= tolerance:
        return Related(Relation.WHOLE, error)
    if all(float(piece.norm()) <= tolerance * scale for piece in held):
        return Related(Relation.ZERO, error)
    factor = _factor(held, [whole] * n)
    if all(
        float((piece - held[0]).norm()) <= tolerance * scale for piece in held
    ):  # a rank can't be alone with a part
        if factor is not None and far([whole * factor] * n) <= tolerance * max(1.0, abs(factor)):
            return Related(Relation.MULTIPLE, error, factor=factor)
        found = blocks_of(held[:1], whole, bound=tolerance * scale)
        if found is not None:
            return Related(Relation.BLOCKS, error, found[0], factor, found[1])
        return Related(Relation.OTHER, error, factor=factor)
    total = torch.stack(held).sum(0)
    if float((total - whole).norm()) / scale <= tolerance:
        return Related(Relation.PARTS, error)
    of_sum = _factor([total], [whole])
    if of_sum and float((total - of_sum * whole).norm()) / scale <= tolerance * max(1.0, abs(of_sum)):
        return Related(Relation.PARTS, error, factor=of_sum)
    found = blocks_of(held, whole, bound=tolerance * scale)
    if found is not None:
        return Related(Relation.BLOCKS, error, found[0], factor, found[1])
    return Related(Relation.UNEQUAL, error, factor=factor)


def _relate_cut(
    held: list[Tensor], whole: Tensor, dim: int, far: Far, *, tolerance: float, is_zero: bool
) -> Related:
    sizes = [piece.shape[dim] for piece in held]
    chunks = list(whole.split(sizes, dim))
    error = far(chunks)
    if error <= tolerance:
        return Related(Relation.SHARDED, error, dim)
    n = len(held)
    if not is_zero and all(float(piece.norm()) == 0 for piece in held):
        return Related(Relation.ZERO, error, dim)
    if len(set(sizes)) == 1:
        for by in range(1, n):
            if far([chunks[(rank + by) % n] for rank in range(n)]) <= tolerance:
                return Related(Relation.SHIFTED, error, dim, float(by))
        if far([torch.stack(chunks).sum(0)] * n) <= tolerance:
            return Related(Relation.ADDED, error, dim)
        for several in (2, 3, 4):
            if (
                whole.shape[dim] % (several * n) == 0
                and far([cut_apart(whole, dim, several, n, rank) for rank in range(n)]) <= tolerance
            ):
                return Related(Relation.ONE_OF_SEVERAL, error, dim, float(several))
    factor = _factor(held, chunks)
    if factor is not None and far([factor * chunk for chunk in chunks]) <= tolerance * max(1.0, abs(factor)):
        return Related(Relation.MULTIPLE, error, dim, factor)
    bound = tolerance * float(whole.norm())
    if is_reordered(held, whole, dim, bound=bound):
        return Related(Relation.REORDERED, error, dim)
    found = blocks_of([torch.cat(held, dim)], whole, bound=bound)
    if found is not None:
        return Related(Relation.BLOCKS, error, found[0], factor, found[1])
    return Related(Relation.OTHER, error, dim, factor)


def cut_apart(whole: Tensor, dim: int, several: int, n: int, rank: int) -> Tensor:
    """What one of n ranks holds where `several` equal tensors lie in one along dim and each is cut by itself;
    1: cut as one. It must divide."""
    return torch.cat([part.chunk(n, dim)[rank] for part in whole.chunk(several, dim)], dim)


def is_reordered(held: Sequence[Tensor], whole: Tensor, dim: int, *, bound: float) -> bool:
    """Whether the ranks have all slices of the whole along dim, each once, in any order: told by what a
    random projection makes of each slice."""
    slices = [_projected(each, dim) for each in (torch.cat(list(held), dim), whole)]
    found, expected = (each.sort().values for each in slices)
    return bool(float((found - expected).norm()) <= bound)


def _projected(tensor: Tensor, dim: int) -> Tensor:
    """A number for each slice along dim."""
    rows = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    weights = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    projected: Tensor = rows.double() @ (weights / weights.norm())
    return projected


def _factor(held: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Least-squares factor between them; None where the expected is zero."""
    own = sum(float(part.square().sum()) for part in expected)
    product = sum(float((piece * part).sum()) for piece, part in zip(held, expected, strict=True))
    return product / own if own else None


def cut_dim(shapes: Sequence[torch.Size], whole: torch.Size) -> int | None:
    """The one dim along which the pieces' sizes add up to the whole's."""
    if any(len(shape) != len(whole) for shape in shapes):
        return None
    differing = {dim for shape in shapes for dim in range(len(whole)) if shape[dim] != whole[dim]}
    if len(differing) != 1:
        return None
    dim = differing.pop()
    return dim if sum(shape[dim] for shape in shapes) == whole[dim] else None
