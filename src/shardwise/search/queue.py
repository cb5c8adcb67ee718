"""The queue of a search: candidates by their bounds, the least first."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from shardwise.core.prediction import Prediction
from shardwise.core.search import Candidate


class Stage(Enum):
    """What a node's bound is of, and so what is to be done when it comes up."""

    ROOT = auto()
    PIECE = auto()
    RECOMPUTED = auto()
    RESTYLED = auto()
    STYLES = auto()
    COMPOSED = auto()
    KNOWN = auto()


SIMPLE = 1.1
"""Where a good answer is sought early, each further axis of the mesh counts as so many times the bound."""


@dataclass(slots=True)
class Node:
    """without: (seconds that a recomputed candidate takes without its recompute, how many of its layers must
    be), both at least."""

    candidate: Candidate
    stage: Stage
    prediction: Prediction | None = None
    composed_s: float | None = None
    without: tuple[float, int] = (0.0, 0)
    is_done: bool = False
    bound: float = 0.0


class Queue:
    """By their bounds, which proves; and in turns those that are put together already, or lie on simple
    meshes, so that there is a good answer early. Other styles wait until the best with the default ones is
    known: they take many traces, and save little."""

    def __init__(self) -> None:
        self._all: list[tuple[float, int, Node]] = []
        self._composed: list[tuple[float, int, Node]] = []
        self._simple: list[tuple[float, int, Node]] = []
        self._styles: list[tuple[float, int, Node]] = []
        self._pushed = self._turns = 0

    def __len__(self) -> int:
        return len(self._all) + len(self._styles)

    def push(self, bound: float, node: Node) -> None:
        self._pushed += 1
        node.is_done = False
        heap = self._styles if node.stage in (Stage.RESTYLED, Stage.STYLES) else self._all
        heapq.heappush(heap, (bound, self._pushed, node))
        if node.stage is Stage.COMPOSED:
            heapq.heappush(self._composed, (bound, self._pushed, node))
        elif heap is self._all and node.stage is not Stage.KNOWN:
            axes = sum(size > 1 for _, size in node.candidate.axes)
            heapq.heappush(self._simple, (bound * SIMPLE**axes, self._pushed, node))
        node.bound = bound

    def is_left(self) -> bool:
        while self._all and self._all[0][2].is_done:
            heapq.heappop(self._all)
        return bool(self._all or self._styles)

    def least(self) -> float:
        """The least bound of all; 0 where nothing is left."""
        return min((heap[0][0] for heap in (self._all, self._styles) if self.is_left() and heap), default=0.0)

    def pop(self, below: float, *, in_order: bool) -> tuple[float, Node]:
        """That with the least bound; in every second turn, unless in_order, the one that promises a good
        answer soon, if its bound is below `below`."""
        self._turns += 1
        if self.is_left() and self._styles and self._are_styles_next():
            bound, _, node = heapq.heappop(self._styles)
            return bound, node
        early = (self._composed, self._simple) if self._turns % 2 and not in_order else ()
        for heap in (*early, self._all):
            while heap and (heap is self._all or heap[0][2].bound < below):
                *_, node = heapq.heappop(heap)
                if not node.is_done:
                    node.is_done = True
                    return node.bound, node
        raise IndexError("nothing is left")

    def _are_styles_next(self) -> bool:
        """Whether one of them could be better than the best with default ones."""
        if not self._all:
            return True
        bound, _, node = self._all[0]
        return node.stage is Stage.KNOWN and self._styles[0][0] < bound

    def nearest(self, count: int) -> Iterator[tuple[float, Node]]:
        """Those that come next."""
        for bound, _, node in heapq.nsmallest(count, self._all):
            if not node.is_done:
                yield bound, node

    def left_below(self, limit: float) -> set[Candidate]:
        """Those that may take less."""
        nodes = (node for heap in (self._all, self._styles) for _, _, node in heap)
        return {node.candidate for node in nodes if not node.is_done and node.bound < limit}

    def unlooked(self) -> Iterator[tuple[Candidate, float]]:
        """Candidates of which nothing but bounds is known, with these."""
        for bound, _, node in self._all:
            if not node.is_done and node.stage in (Stage.ROOT, Stage.PIECE):
                yield node.candidate, bound
