"""Counts: integer attributes that a forward writes into shapes and that count what is cut, so that a rank's
module must hold its own number: 1 / ranks of it, or of some of its pieces and all of others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from shardwise.core.held import format_pieces
from shardwise.dims.factors import ConflictError, Factor, Piece, layout, leaves, local_size
from shardwise.dims.record import Op, Record, SizeUse, Value
from shardwise.dims.sizes import Attribute, Expression, Length, attributes_in, evaluate
from shardwise.planner.regions import Region, UnfitError

_MOST_TOGETHER = 3
_MOST_TRIES = 200


@dataclass(frozen=True, slots=True)
class Count:
    """An attribute that a rank has its part of. pieces: of what it counts, where ranks have parts of some of
    them only."""

    attribute: Attribute
    pieces: tuple[Piece, ...] = ()

    def said(self, ranks: int) -> str:
        """As `divide` has it: see core.held.count_of()."""
        pieces = format_pieces(*pieces_and_parts(self.pieces, ranks))
        return f"{self.attribute.name}: {pieces}" if pieces else self.attribute.name

    def on_a_rank(self, ranks: int) -> int:
        if not self.pieces:
            return self.attribute.value // ranks
        return sum(piece.on_a_rank(ranks) for piece in self.pieces)


def pieces_and_parts(pieces: Sequence[Piece], ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As a plan says them (core/held.py): a piece that isn't cut is one part, which all ranks use."""
    counts = [piece.parts(ranks) for piece in pieces]
    parts = tuple(0 if count == ranks else count for count in counts)
    if not any(parts):
        return (tuple(piece.size for piece in pieces), ()) if len(pieces) > 1 else ((), ())
    return tuple(piece.size for piece in pieces), parts


def divided(record: Record, regions: Sequence[Region], ranks: int) -> frozenset[Count]:
    """The attributes of which each rank has a part, so that every size that the forward writes is the one
    that its tensors have there. Raises UnfitError where no choice of attributes makes it so."""
    sizes = _Sizes(record, regions, ranks)
    return _Search(sizes, [use for use in record.sizes if sizes.is_told(use)]).run()


class _Search:
    """For a choice of counts with which every use holds: what one use leaves open another may decide."""

    def __init__(self, sizes: "_Sizes", uses: Sequence[SizeUse]) -> None:
        self._sizes, self._uses = sizes, uses
        self._tries = _MOST_TRIES
        self._reached = -1

    def run(self) -> frozenset[Count]:
        found = self._from(frozenset())
        if found is None:
            use = self._uses[self._reached]  # the furthest that a choice came
            raise UnfitError(_complaint(use, self._sizes), self._sizes.cut_in(use))
        return found

    def _from(self, chosen: frozenset[Count]) -> frozenset[Count] | None:
        at = next((n for n, use in enumerate(self._uses) if not self._sizes.holds(use, chosen)), None)
        if at is None:
            return chosen
        self._reached, self._tries = max(self._reached, at), self._tries - 1
        for more in self._options(self._uses[at], chosen):
            found = self._from(chosen | more) if self._tries > 0 else None
            if found is not None:
                return found
        return None

    def _options(self, use: SizeUse, chosen: frozenset[Count]) -> Iterator[frozenset[Count]]:
        """What makes a use hold, the fewest counts first."""
        sizes = self._sizes
        free = {*attributes_in(use.size), *attributes_in(use.start)} - {each.attribute for each in chosen}
        in_pieces = sizes.in_pieces(use)
        if in_pieces and isinstance(use.size, Attribute) and use.size in free:
            found = frozenset({Count(use.size, in_pieces)})
            if sizes.holds(use, chosen | found):
                yield found
        possible = [
            count
            for each in sorted(free, key=lambda each: (each.module, each.name))
            for count in sizes.counts_of(each)
        ]
        for n in range(1, min(_MOST_TOGETHER, len(free)) + 1):
            for more in combinations(possible, n):
                found = frozenset(more)
                if len({each.attribute for each in more}) == n and sizes.holds(use, chosen | found):
                    yield found


def _complaint(use: SizeUse, sizes: "_Sizes") -> str:
    return (
        f"{use.module or 'the model'} writes a size into {use.function} that no attribute gives "
        f"({sizes.expected(use)} on a rank)"
    )


class _Sizes:
    """What sizes are on one rank."""

    def __init__(self, record: Record, regions: Sequence[Region], ranks: int) -> None:
        self.ranks = ranks
        self._cut = frozenset[Factor]().union(*(region.candidate.leaves for region in regions))
        self._gathered = set[str]().union(*(region.candidate.gathered for region in regions))
        self._sequence = record.sequence
        self._values = {value.number: value for value in _values(record)}

    def is_told(self, use: SizeUse) -> bool:
        """Whether the size is of what is cut, or could be: a sequence's own length follows its tensors."""
        dim = use.value.dims[use.dim] if use.of is None else use.of
        return self._sequence.isdisjoint(leaves(dim)) and use.module not in self._gathered

    def cut_in(self, use: SizeUse) -> frozenset[Factor]:
        dims = [use.value.dims[use.dim], *([use.of] if use.of is not None else [])]
        return self._cut.intersection(leaf for dim in dims for leaf in leaves(dim))

    def expected(self, use: SizeUse) -> int:
        return self._local(use.value.dims[use.dim])

    def counts_of(self, attribute: Attribute) -> Iterator[Count]:
        """How a rank could have its part of it: one for each rank, or for each of fewer units."""
        if attribute.value % self.ranks == 0:
            yield Count(attribute)
        for units in sorted({leaf.size for leaf in self._cut if leaf.size < self.ranks}):
            if attribute.value % units == 0:
                yield Count(attribute, (Piece(attribute.value, True, units),))

    def in_pieces(self, use: SizeUse) -> tuple[Piece, ...]:
        """Of the dim that is written: where ranks have parts of some only, or share parts, its pieces."""
        pieces = tuple(layout(use.value.dims[use.dim], self._cut))
        counts = {piece.parts(self.ranks) for piece in pieces}
        return () if counts <= {self.ranks} or not any(piece.is_cut for piece in pieces) else pieces

    def holds(self, use: SizeUse, chosen: frozenset[Count]) -> bool:
        try:
            if self._evaluate(use.size, chosen) != self.expected(use):
                return False
            if use.of is None:
                return True
            return self._evaluate(use.start, chosen) == self._prefix(use.of, evaluate(use.start, self._whole))
        except ConflictError:
            return False

    def _evaluate(self, expression: Expression, chosen: frozenset[Count]) -> int:
        counted = {each.attribute: each.on_a_rank(self.ranks) for each in chosen}

        def value_of(known: Attribute | Length) -> int:
            if isinstance(known, Attribute):
                return counted.get(known, known.value)
            return self._local(self._values[known.tensor].dims[known.dim])

        return evaluate(expression, value_of)

    def _whole(self, known: Attribute | Length) -> int:
        if isinstance(known, Attribute):
            return known.value
        return self._values[known.tensor].dims[known.dim].size

    def _local(self, dim: Factor) -> int:
        return local_size(dim, self._cut, self.ranks)

    def _prefix(self, dim: Factor, start: int) -> int:
        """Where on a rank the entry `start` of the whole dim stands, or would."""
        reached, local = 0, 0
        for piece in layout(dim, self._cut):
            if reached >= start:
                break
            taken = min(piece.size, start - reached)
            if taken % piece.parts(self.ranks):
                raise ConflictError("a boundary inside a rank's part")
            local += taken // piece.parts(self.ranks)
            reached += piece.size
        return local


def _values(record: Record) -> Iterable[Value]:
    yield from record.parameters.values()
    yield from record.buffers.values()
    yield from record.apart.values()
    if record.ids is not None:
        yield record.ids
    for event in record.events:
        if isinstance(event, Op):
            yield from event.inputs
            yield from event.outputs
