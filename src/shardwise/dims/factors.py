"""Factors: what a dim of a tensor is made of, and how two dims become one. Plain arithmetic on sizes, no
torch.

A factor is a leaf, an ordered product (outer to inner: 8 heads x 128) or an ordered sum of pieces laid one
after the other (query + key + value). Tying two dims together refines both to common boundaries, so that a
leaf is the least part that a model treats as one; leaves that are tied are one leaf (a union-find). A dim
that can't be refined to another's boundaries is a conflict, which the caller books.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto


class ConflictError(Exception):
    """Two dims that can't be the same: sizes or boundaries don't fit."""


class _Kind(Enum):
    LEAF = auto()
    PRODUCT = auto()
    SUM = auto()


class Factor:
    """A part of a dim. Compare the factors that find() gives, by identity."""

    __slots__ = ("_kind", "_parent", "parts", "size")

    def __init__(self, size: int, kind: _Kind = _Kind.LEAF, parts: Sequence["Factor"] = ()) -> None:
        self.size = size
        self.parts = tuple(parts)
        self._kind = kind
        self._parent: Factor | None = None

    @property
    def is_leaf(self) -> bool:
        return find(self)._kind is _Kind.LEAF

    @property
    def is_sum(self) -> bool:
        return find(self)._kind is _Kind.SUM

    def __repr__(self) -> str:
        this = find(self)
        if this.is_leaf:
            return str(this.size)
        return "(" + ("*" if this._kind is _Kind.PRODUCT else "+").join(map(repr, this.parts)) + ")"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a dim's entries; is_cut: each rank has its chunk of it, else every rank has all of it. units:
    in how many it can be cut; where there are fewer than ranks, neighbours have the same chunk. 0: in any
    number."""

    size: int
    is_cut: bool
    units: int = field(default=0, compare=False)

    def parts(self, ranks: int) -> int:
        """Into how many chunks so many ranks cut it."""
        if not self.is_cut:
            return 1
        return min(self.units or ranks, ranks)

    def on_a_rank(self, ranks: int) -> int:
        """How many of its entries one rank has."""
        return self.size // self.parts(ranks)


def find(factor: Factor) -> Factor:
    """What a factor is by now."""
    root = factor
    while root._parent is not None:
        root = root._parent
    while factor is not root:
        factor._parent, factor = root, factor._parent
    return root


def product(factors: Iterable[Factor]) -> Factor:
    """The product of factors, outer to inner."""
    flattened = [each for factor in factors for each in flat(factor)]
    if not flattened:
        return Factor(1)
    if len(flattened) == 1:
        return flattened[0]
    return Factor(math.prod(each.size for each in flattened), _Kind.PRODUCT, flattened)


def concatenation(parts: Sequence[Factor]) -> Factor:
    """Pieces laid one after the other."""
    filled = [find(part) for part in parts if part.size]
    return filled[0] if len(filled) == 1 else Factor(sum(part.size for part in filled), _Kind.SUM, filled)


def flat(factor: Factor) -> list[Factor]:
    """A factor as a product's factors, none of them a product or of size 1."""
    factor = find(factor)
    if factor.size == 1:
        return []
    if factor._kind is _Kind.PRODUCT:
        return [each for part in factor.parts for each in flat(part)]
    return [factor]


def pieces(factor: Factor) -> list[Factor]:
    """A factor as a sum's pieces, none of them a sum."""
    factor = find(factor)
    return [each for part in factor.parts for each in pieces(part)] if factor.is_sum else [factor]


def leaves(factor: Factor) -> Iterator[Factor]:
    """The leaves of more than one entry."""
    factor = find(factor)
    if factor.is_leaf:
        if factor.size > 1:
            yield factor
        return
    for part in factor.parts:
        yield from leaves(part)


def is_partly(factor: Factor, cut: frozenset[Factor]) -> bool:
    """Whether some of the pieces that lie one after the other in it have fewer leaves of `cut` than others,
    or none."""
    factor = find(factor)
    own = {cut.intersection(leaves(part)) for part in factor.parts} if factor.is_sum else set()
    if any(some < more for some in own for more in own):
        return True
    return any(is_partly(part, cut) for part in factor.parts)


def layout(factor: Factor, cut: frozenset[Factor]) -> list[Piece]:
    """The dim's entries in order, where the leaves `cut` are cut over ranks. Raises ConflictError where two
    factors of one product are, unless they are neighbours: ranks then share out all that they are together,
    fewer than ranks each."""
    factor = find(factor)
    match factor._kind:
        case _Kind.LEAF:
            return [Piece(factor.size, factor in cut, factor.size)]
        case _Kind.SUM:
            return _merged(piece for part in factor.parts for piece in layout(part, cut))
    found: list[Piece] = [Piece(1, False)]
    seen: set[Factor] = set()
    for part in reversed(factor.parts):
        inner = sum(piece.size for piece in found)
        if not any(piece.is_cut for piece in found):
            found = [Piece(piece.size * inner, piece.is_cut, piece.units) for piece in layout(part, cut)]
        elif any(piece.is_cut for piece in layout(part, cut)):
            outer = find(part)
            if outer in seen or len(found) > 1 or not outer.is_leaf:
                raise ConflictError(f"{factor} would be cut twice")
            found = [Piece(outer.size * inner, True, outer.size * found[0].units)]
        else:
            found = _merged(piece for _ in range(find(part).size) for piece in found)
        seen.update(leaves(part))
    return found


def local_size(factor: Factor, cut: frozenset[Factor], ranks: int) -> int:
    """How many entries one of `ranks` ranks has."""
    return sum(piece.on_a_rank(ranks) for piece in layout(factor, cut))


def view(dims: Iterable[Factor], sizes: Sequence[int]) -> list[Factor]:
    """The dims of other sizes over the same entries in the same order."""
    rest = [each for dim in dims for each in flat(dim)]
    found = []
    for size in sizes:
        if size == 1:
            found.append(Factor(1))
            continue
        outer, inner = _take(rest, size)
        found.append(outer)
        rest = flat(inner)
    return found


def narrow(factor: Factor, start: int, stop: int) -> Factor:
    """The entries from start to stop. Raises ConflictError where a boundary falls inside a leaf's unit."""
    factor = find(factor)
    if start == 0 and stop == factor.size:
        return factor
    if start == stop:
        return Factor(0)
    if start > 0:
        factor, stop = _cut_at(factor, start)[1], stop - start
    return _cut_at(factor, stop)[0] if stop < factor.size else find(factor)


def unify(a: Factor, b: Factor) -> None:
    """Makes two factors one. Raises ConflictError, with nothing undone of what was refined until then."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise ConflictError(f"{a.size} and {b.size}")
    if a.is_leaf:
        _become(a, b)
    elif b.is_leaf:
        _become(b, a)
    elif a.is_sum and b.is_sum:
        _unify_sums(pieces(a), pieces(b))
    elif a.is_sum or b.is_sum:
        _unify_sum_and_product(*((a, b) if a.is_sum else (b, a)))
    else:
        _unify_products(flat(a), flat(b))


def _merged(found: Iterable[Piece]) -> list[Piece]:
    """Neighbours that nobody cuts are one piece."""
    merged: list[Piece] = []
    for piece in found:
        if merged and not piece.is_cut and not merged[-1].is_cut:
            merged[-1] = Piece(merged[-1].size + piece.size, False)
        else:
            merged.append(piece)
    return merged


def _become(leaf: Factor, other: Factor) -> None:
    leaf, other = find(leaf), find(other)
    if leaf is other:
        return
    if any(each is leaf for each in leaves(other)):
        raise ConflictError(f"{leaf} is a part of {other}")
    leaf._parent = other


def _take(sequence: Sequence[Factor], size: int) -> tuple[Factor, Factor]:
    """A flat product cut in two: the outer factors, whose product is `size`, and the inner ones."""
    outer: list[Factor] = []
    rest, reached = list(sequence), 1
    while reached < size:
        if not rest:
            raise ConflictError(f"no {size} in {list(sequence)}")
        factor = find(rest.pop(0))
        if not factor.is_leaf and not factor.is_sum:
            rest = flat(factor) + rest
        elif size % (reached * factor.size) == 0:
            outer.append(factor)
            reached *= factor.size
        elif size % reached == 0 and factor.size % (size // reached) == 0:
            first, second = _split(factor, size // reached)
            outer.append(first)
            rest, reached = [second, *rest], size
        else:
            raise ConflictError(f"{size} in {list(sequence)}")
    return product(outer), product(rest)


def _split(factor: Factor, outer: int) -> tuple[Factor, Factor]:
    """A leaf or a sum as a product of two; in a sum each piece is one, with the same inner factor."""
    factor = find(factor)
    if factor.size % outer:
        raise ConflictError(f"{factor.size} into {outer}")
    inner = factor.size // outer
    if factor.is_leaf:
        first, second = Factor(outer), Factor(inner)
        _become(factor, Factor(factor.size, _Kind.PRODUCT, (first, second)))
        return first, second
    parts = pieces(factor)
    if any(part.size % inner for part in parts):
        if len({part.size for part in parts}) == 1 and len(parts) % outer == 0:
            # whole pieces side by side: equal groups of them
            each = len(parts) // outer
            groups = [concatenation(parts[at * each : (at + 1) * each]) for at in range(outer)]
            for group in groups[1:]:
                unify(groups[0], group)
            return _ones(outer), find(groups[0])
        raise ConflictError(f"pieces {[part.size for part in parts]} by {inner}")
    common, outers = Factor(inner), []
    for part in parts:
        first, second = _take(flat(part), part.size // inner)
        unify(second, common)
        outers.append(first)
    return concatenation(outers), find(common)


def _ones(n: int) -> Factor:
    """What counts n equal pieces, each a tensor of its own: no leaf, since no rank can have a part of it."""
    return concatenation([Factor(1) for _ in range(n)])


def _cut_at(factor: Factor, at: int) -> tuple[Factor, Factor]:
    """Two pieces of a factor, the first of size `at`."""
    factor = find(factor)
    if factor.is_leaf:
        first, second = Factor(at), Factor(factor.size - at)
        _become(factor, Factor(factor.size, _Kind.SUM, (first, second)))
        return first, second
    if factor.is_sum:
        before, after, reached = list[Factor](), pieces(factor), 0
        while after and reached + after[0].size <= at:
            reached += after[0].size
            before.append(after.pop(0))
        if reached < at:
            first, second = _cut_at(after[0], at - reached)
            before, after = [*before, first], [second, *after[1:]]
        return concatenation(before), concatenation(after)
    outermost, *others = flat(factor)
    inner = product(others)
    if at % inner.size:
        raise ConflictError(f"a boundary at {at} of {factor}")
    first, second = _cut_at(outermost, at // inner.size)
    return product([first, inner]), product([second, inner])


def _unify_products(a: list[Factor], b: list[Factor]) -> None:
    while a and b:
        first, second = find(a[0]), find(b[0])
        if not first.is_leaf and not first.is_sum:
            a = flat(first) + a[1:]
        elif not second.is_leaf and not second.is_sum:
            b = flat(second) + b[1:]
        elif first is second or first.size == second.size:
            unify(first, second)
            a, b = a[1:], b[1:]
        elif first.size % second.size == 0:
            a = [*_split(first, second.size), *a[1:]]
        elif second.size % first.size == 0:
            b = [*_split(second, first.size), *b[1:]]
        else:
            raise ConflictError(f"{a} and {b}")


def _unify_sums(a: list[Factor], b: list[Factor]) -> None:
    while a and b:
        first, second = find(a[0]), find(b[0])
        if first.size == second.size:
            unify(first, second)
            a, b = a[1:], b[1:]
        elif first.size > second.size:
            a = [*_cut_at(first, second.size), *a[1:]]
        else:
            b = [*_cut_at(second, first.size), *b[1:]]


def _unify_sum_and_product(sum_: Factor, product_: Factor) -> None:
    outermost, *others = flat(product_)
    inner = math.prod(each.size for each in others)
    parts = pieces(sum_)
    if all(part.size % inner == 0 for part in parts):
        outer, rest = _split(sum_, outermost.size) if outermost.size > 1 else (outermost, sum_)
        unify(outer, outermost)
        unify(rest, product(others))
    else:
        raise ConflictError(f"{product_} and {sum_}")
