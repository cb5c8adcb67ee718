"""Timeline: what every rank's CPU threads and device streams did, when: columns of spans. Read from profiles,
or predicted.

A Timeline says what happened. Waiting, exposure and idle need several lanes at once: core/decomposition.py
finds them. What wasn't recorded is absent (NONE in a column) and never 0. Times are whole nanoseconds since
`origin_ns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from shardwise.core.waiting import Loss

NONE = -1


class SpanKind(IntEnum):
    """What a span is. COMPUTE, COLLECTIVE and COPY (the first three) are work; OP, LAUNCH and RANGE are what
    the CPU says of it."""

    COMPUTE = 0
    COLLECTIVE = 1
    COPY = 2
    OP = 3
    LAUNCH = 4
    RANGE = 5


class Pass(IntEnum):
    """Which part of a step a span belongs to. END: what comes after the last backward: sums over replicas,
    clipping, the optimizer."""

    FORWARD = 0
    BACKWARD = 1
    END = 2


@dataclass(frozen=True, slots=True)
class Lane:
    """A CPU thread or a device's stream of one rank. count: how many ranks a predicted lane stands for."""

    rank: int
    is_device: bool
    process: str
    thread: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Spans:
    """Columns, one row a span. name, shapes: into Timeline.names. launched_ns: when the CPU called for it.
    parent: the span of the CPU op in which it was called for. n_bytes: of a copy. module: into
    Timeline.names, whose forward or backward it belongs to; step_pass: a Pass."""

    lane: NDArray[np.int32]
    kind: NDArray[np.int8]
    name: NDArray[np.int32]
    shapes: NDArray[np.int32]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    launched_ns: NDArray[np.int64]
    parent: NDArray[np.int32]
    n_bytes: NDArray[np.int64]
    module: NDArray[np.int32]
    step_pass: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.start_ns)


@dataclass(frozen=True, slots=True)
class Group:
    """A process group's ranks (None: the file doesn't say); name: as the file calls it, or ""."""

    name: str
    ranks: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Collectives:
    """Columns, one row a collective span. op, dtype, origin: into Timeline.names ("all_reduce"; origin: the
    module that asked). group: into Timeline.groups. full_bytes: of the whole tensor, as core/collective.py
    means it. arrival_ns: when the last rank came, on this rank's clock; set once the ranks were put
    together."""

    span: NDArray[np.int32]
    op: NDArray[np.int32]
    dtype: NDArray[np.int32]
    origin: NDArray[np.int32]
    group: NDArray[np.int32]
    sequence: NDArray[np.int64]
    elements: NDArray[np.int64]
    full_bytes: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.span)


@dataclass(frozen=True, slots=True)
class Window:
    """One step of one rank. step: its number, or None where the file marks no steps."""

    rank: int
    step: int | None
    start_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class Timeline:
    """Lanes and spans of one or more ranks. facts: what the file says of itself, such as its device."""

    lanes: tuple[Lane, ...]
    names: tuple[str, ...]
    spans: Spans
    collectives: Collectives
    groups: tuple[Group, ...]
    windows: tuple[Window, ...]
    origin_ns: int
    facts: tuple[tuple[str, str], ...] = ()
    losses: tuple[Loss, ...] = ()
    launches_without_kernel: tuple[int, int] = field(default=(0, 0))  # (of them, launches in all)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({lane.rank for lane in self.lanes}))

    def windows_of(self, rank: int) -> tuple[Window, ...]:
        return tuple(window for window in self.windows if window.rank == rank)

    def on_lanes(self, chosen: Sequence[bool]) -> NDArray[np.bool_]:
        """Which spans lie on the chosen lanes; chosen: one truth a lane."""
        if not self.lanes:
            return np.zeros(len(self.spans), np.bool_)
        return np.asarray(chosen, np.bool_)[self.spans.lane]

    def of_rank(self, rank: int) -> NDArray[np.bool_]:
        """Which spans are a rank's."""
        return self.on_lanes([lane.rank == rank for lane in self.lanes])

    def name(self, span: int) -> str:
        return self.names[int(self.spans.name[span])]

    def shifted(self, offset_ns: int) -> "Timeline":
        """The same with every time later by offset_ns."""
        spans, collectives = self.spans, self.collectives
        return replace(
            self,
            spans=replace(
                spans,
                start_ns=spans.start_ns + offset_ns,
                end_ns=spans.end_ns + offset_ns,
                launched_ns=_shift(spans.launched_ns, offset_ns),
            ),
            collectives=replace(collectives, arrival_ns=_shift(collectives.arrival_ns, offset_ns)),
            windows=tuple(
                replace(window, start_ns=window.start_ns + offset_ns, end_ns=window.end_ns + offset_ns)
                for window in self.windows
            ),
        )


def _shift(times_ns: NDArray[np.int64], offset_ns: int) -> NDArray[np.int64]:
    return np.where(times_ns == NONE, NONE, times_ns + offset_ns)
