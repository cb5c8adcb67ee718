"""Where a run begins to go wrong: of all points of its trail the ones that are wrong though all that they are
computed from is right. In the forward that is asked of values, in the backward of gradients.

A gradient that is a part on each rank is right where somebody sums it, so it isn't wrong by itself; but where
what is computed from it is wrong, the sum is what lacks. A point that can't be compared (the sharded model
doesn't call the module) is looked through.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from itertools import combinations

from shardwise.verify.relation import Related, Relation
from shardwise.verify.trail import Flow, Side


class Judgement(Enum):
    RIGHT = auto()
    PART = auto()
    WRONG = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Seen:
    """A point of the unsharded model's trail: how what the ranks have there, and the gradient that came back
    to it, relate to the unsharded ones. None: there is none, or the sharded model has no such point."""

    module: str
    side: Side
    value: Related | None = None
    gradient: Related | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a wrong gradient comes from. points: the wrong ones nearest to the loss; empty: the parameter's
    own gradient is the first that is wrong. are_parts: they are parts of a sum that lacks. right: the points
    next to it, towards the loss, where all is right. related: how it is wrong there."""

    points: tuple[int, ...]
    right: frozenset[int]
    are_parts: bool = False
    related: Related | None = None

    @property
    def last(self) -> int:
        """The point of it that is nearest to the loss."""
        return max((*self.points, *self.right), default=-1)

    @property
    def fault(self) -> object:
        """Equal of what one fault makes wrong between the same points; None: nothing that is sure."""
        return fault_of(self.related) if self.related is not None and self.right else None


def fault_of(related: Related | None) -> object:
    """What several tensors that one fault makes wrong have in common; None: nothing that is sure."""
    if related is None:
        return None
    if related.relation in (Relation.ZERO, Relation.MISSING):
        return "nothing"
    if related.relation in (Relation.MULTIPLE, Relation.PARTS) and related.factor is not None:
        return round(related.factor, 6)
    return None


def judged(related: Related | None) -> Judgement:
    """Of an activation, or of what comes back to one."""
    if related is None:
        return Judgement.UNKNOWN
    if related.is_right:
        return Judgement.RIGHT
    if related.relation is Relation.PARTS and related.factor is None:
        return Judgement.PART
    is_comparable = related.error < float("inf") or related.relation is Relation.MISSING
    return Judgement.WRONG if is_comparable else Judgement.UNKNOWN


@dataclass(frozen=True, slots=True)
class _Way:
    """A direction in which points depend on each other, and what is judged of each on it."""

    towards: Sequence[Sequence[int]]
    judgements: Sequence[Judgement]

    def near(self, points: Iterable[int]) -> dict[Judgement, set[int]]:
        """Of these points and those behind them, the nearest that are known, by judgement."""
        found: dict[Judgement, set[int]] = {each: set() for each in Judgement}
        for at in self.reached(points):
            found[self.judgements[at]].add(at)
        found[Judgement.UNKNOWN].clear()
        return found

    def reached(self, points: Iterable[int]) -> set[int]:
        """These and those behind them, up to the nearest that are known."""
        left = list(points)
        reached = set(left)
        while left:
            at = left.pop()
            if self.judgements[at] is Judgement.UNKNOWN:
                more = set(self.towards[at]) - reached
                reached |= more
                left += more
        return reached

    def ends_of_parts(self, parts: Iterable[int]) -> tuple[int, ...]:
        """Where these parts of sums come from: the last parts in this direction."""
        ends: set[int] = set()
        left = list(parts)
        reached = set(left)
        while left:
            at = left.pop()
            more = self.near(self.towards[at])[Judgement.PART]
            if not more:
                ends.add(at)
            left += more - reached
            reached |= more
        return tuple(sorted(ends))


Lacks = Callable[[int, Sequence[int]], bool]
"""Whether the gradient at a point is wrong by just this: those at other points, parts on each rank, aren't
summed."""


class Roots:
    """Of one trail."""

    def __init__(self, seen: Sequence[Seen], flow: Flow, lacks: Lacks = lambda _, __: False) -> None:
        self.seen = seen
        self._lacks = lacks
        self.uses = flow.uses
        self._forward = _Way(flow.before, [judged(each.value) for each in seen])
        self._backward = _Way(flow.after, [judged(each.gradient) for each in seen])
        self._sources: dict[int, Source] = {}

    @cached_property
    def first_wrong(self) -> int | None:
        """The point where values begin to be wrong; None where none is known to be."""
        judgements = self._forward.judgements
        at = max((at for at, each in enumerate(judgements) if each is Judgement.WRONG), default=None)
        while at is not None:
            earlier = self._forward.near(self._forward.towards[at])[Judgement.WRONG]
            if not earlier:
                break
            at = min(earlier)
        return at

    def made_of(self, at: int) -> list[int]:
        """The known points that a point's value is computed from."""
        near = self._forward.near(self._forward.towards[at])
        return sorted(each for found in near.values() for each in found)

    def parameters_in(self, at: int) -> list[str]:
        """Those that a point's value is computed from, with no known point in between."""
        near = set().union(*self._forward.near(self._forward.towards[at]).values())
        between = self._forward.reached(self._forward.towards[at]) - near | {at}
        return [name for name, uses in self.uses.items() if not between.isdisjoint(uses)]

    def parts_before(self, at: int) -> tuple[int, ...]:
        """Those of them whose values are parts of a sum, the first on each way."""
        near = self._forward.near(self._forward.towards[at])
        return self._forward.ends_of_parts(near[Judgement.PART])

    def source(self, name: str, own: Related) -> Source:
        """Of a parameter's wrong gradient. own: how it is wrong."""
        return self._source((), self.uses.get(name, ()), own)

    def arrival(self, name: str) -> int:
        """Smaller of what is nearer to the loss, and so has its gradient sooner."""
        return -max(self.uses.get(name, ()), default=-1)

    def _source(self, points: tuple[int, ...], later: Iterable[int], own: Related) -> Source:
        near = self._backward.near(later)
        if near[Judgement.WRONG] and not _are_parts(own):
            return max((self._of_point(at) for at in near[Judgement.WRONG]), key=lambda each: each.last)
        parts = near[Judgement.PART]
        guilty = parts if _are_parts(own) or not points else self._unsummed(points[0], sorted(parts))
        if guilty and (_are_parts(own) or own.relation in _MIXED):
            ends = self._backward.ends_of_parts(guilty)
            return Source(ends, frozenset(near[Judgement.RIGHT]), are_parts=True)
        return Source(points, frozenset(near[Judgement.RIGHT] | parts), related=own)

    def _unsummed(self, at: int, parts: Sequence[int]) -> set[int]:
        """Those of the parts whose sum is what the point lacks."""
        sizes = range(len(parts), 0, -1) if len(parts) <= _MOST_PARTS else (len(parts), 1)
        several = (each for size in sizes for each in combinations(parts, size))
        return next((set(each) for each in several if self._lacks(at, each)), set())

    def _of_point(self, at: int) -> Source:
        if at not in self._sources:
            own = self.seen[at].gradient
            assert own is not None
            self._sources[at] = self._source((at,), self._backward.towards[at], own)
        return self._sources[at]


_MOST_PARTS = 5
"""Of so many every choice is tried."""
_MIXED = frozenset({Relation.UNEQUAL, Relation.OTHER})


def _are_parts(own: Related) -> bool:
    return own.relation is Relation.PARTS and own.factor is None
