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


NEARLY = (Stage.COMPOSED, Stage.RECOMPUTED, Stage.PIECE)
"""Stages of nodes of which few steps more make a known candidate, the nearest first."""


@dataclass(slots=True)
class Node:
    candidate: Candidate
    stage: Stage
    prediction: Prediction | None = None
    composed_s: float | None = None
    is_done: bool = False


class Queue:
    """Two orders of the same nodes: by their bounds, which proves; and of those that are nearly known
    alone, so that there is a good answer early."""

    def __init__(self) -> None:
        self._all: list[tuple[float, int, Node]] = []
        self._nearly: tuple[list[tuple[float, int, Node]], ...] = tuple([] for _ in NEARLY)
        self._pushed = self._turns = 0

    def __len__(self) -> int:
        return len(self._all)

    def push(self, bound: float, node: Node) -> None:
        self._pushed += 1
        node.is_done = False
        heapq.heappush(self._all, (bound, self._pushed, node))
        if node.stage in NEARLY:
            heapq.heappush(self._nearly[NEARLY.index(node.stage)], (bound, self._pushed, node))

    def is_left(self) -> bool:
        while self._all and self._all[0][2].is_done:
            heapq.heappop(self._all)
        return bool(self._all)

    def least(self) -> float:
        """The least bound of all; 0 where nothing is left."""
        return self._all[0][0] if self.is_left() else 0.0

    def pop(self, below: float, *, in_order: bool) -> tuple[float, Node]:
        """That with the least bound; in every second turn of those that are nearly known, the nearest
        first, unless in_order. below: of these only bounds that are less."""
        self._turns += 1
        heaps = (*self._nearly, self._all) if self._turns % 2 and not in_order else (self._all,)
        for heap in heaps:
            while heap and (heap is self._all or heap[0][0] < below):
                bound, _, node = heapq.heappop(heap)
                if not node.is_done:
                    node.is_done = True
                    return bound, node
        raise IndexError("nothing is left")

    def nearest(self, count: int) -> Iterator[tuple[float, Node]]:
        """Those that come next."""
        for bound, _, node in heapq.nsmallest(count, self._all):
            if not node.is_done:
                yield bound, node

    def unlooked(self) -> Iterator[tuple[Candidate, float]]:
        """Candidates of which nothing but bounds is known, with these."""
        for bound, _, node in self._all:
            if not node.is_done and node.stage in (Stage.ROOT, Stage.PIECE):
                yield node.candidate, bound
