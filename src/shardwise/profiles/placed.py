"""What a measured step is booked on, in the words that a prediction has: by pass, module, the op that a
traced step would see, and the shapes that went in.

A traced step sees the dispatcher's ops, of which a profile shows the ones inside too (`aten::clone` calls
`aten::copy_`): of the ops around a piece of work the outermost one counts that the prediction knows. On a CPU
the time of ops that it doesn't know (views, autograd's nodes, what splits up into others) is issuing, as what
Python takes between them is. Past an op that was handed to a subclass of Tensor nobody looks: a traced step
sees what DTensor does, not what DTensor was asked.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwise.core.beside import MOST_SHAPES, LineKind
from shardwise.core.decomposition import work_sets
from shardwise.core.layer_name import any_layer
from shardwise.core.timeline import NONE, Pass, SpanKind, Timeline, Window
from shardwise.profiles.booked import Booked, apart, booked, calls_on_cpu
from shardwise.profiles.classify import is_handed_to_python, plain_name

_MOST_DEEP = 64
_TENSOR = re.compile(r"\[\d+(?:,\d+)*\]")


class Place(NamedTuple):
    """What is booked together. name: of the kernel, or of the CPU's op."""

    kind: LineKind
    step_pass: str
    module: str
    op: str
    shapes: str
    name: str


@dataclass(slots=True)
class Sums:
    """Nanoseconds and calls of a place, over all windows. waiting_ns: for ranks; idle_ns: on a device, with
    the next work launched."""

    count: int = 0
    ns: int = 0
    unsplit_ns: int = 0
    waiting_ns: int = 0
    idle_ns: int = 0


def placed(timelines: Sequence[Timeline], known: Collection[str]) -> tuple[dict[Place, Sums], int]:
    """Sums over all windows of all ranks, and how many windows there are. known: the ops that the prediction
    has. All that the sums hold is the windows' length, to the nanosecond."""
    sums: dict[Place, Sums] = defaultdict(Sums)
    windows = 0
    for timeline in timelines:
        has_device = any(lane.is_device for lane in timeline.lanes)
        rows = _Rows(timeline, frozenset(known), has_device)
        for rank in timeline.ranks:
            sets, calls = work_sets(timeline, rank), calls_on_cpu(timeline, rank)
            for row in apart(timeline.windows_of(rank)):
                rows.book(sums, booked(timeline, sets, calls, rank, row), _begin_in(row, timeline))
                windows += len(row)
    return dict(sums), windows


class _Rows:
    """The work of a Timeline by what is booked together."""

    def __init__(self, timeline: Timeline, known: frozenset[str], has_device: bool) -> None:
        self.timeline, self.has_device = timeline, has_device
        spans = timeline.spans
        self.works = np.flatnonzero(spans.kind <= SpanKind.COPY)
        self.op, is_known = _op_of(timeline, known)
        op = self.op[self.works]
        origin, kind = _of_collectives(timeline)
        table = np.stack(
            (
                spans.step_pass[self.works].astype(np.int64),
                np.where(origin == NONE, spans.module, origin)[self.works].astype(np.int64),
                np.where(op == NONE, NONE, spans.name[op]),
                np.where(op == NONE, NONE, spans.shapes[op]),
                spans.name[self.works].astype(np.int64),
                kind[self.works],
                is_known[self.works].astype(np.int64),
            ),
            axis=1,
        )
        rows, group = np.unique(table, axis=0, return_inverse=True)
        self.group = group.reshape(-1)
        self.places = [self._place(row) for row in rows.tolist()]
        self.issuing = [place._replace(kind=LineKind.ISSUING, op="", shapes="") for place in self.places]

    def _place(self, row: list[int]) -> Place:
        step_pass, module, op, shapes, name, collective, is_known = row
        names = self.timeline.names
        where = (
            "" if step_pass == NONE else Pass(step_pass).name.lower(),
            "" if module == NONE else any_layer(names[module]),
        )
        if collective != NONE:
            return Place(LineKind.EXCHANGE, *where, names[collective], "", plain_name(names[name]))
        op_name = plain_name(names[name]) if op == NONE else names[op]
        if not self.has_device and not is_known:
            return Place(LineKind.ISSUING, *where, "", "", op_name)
        shown = "" if shapes == NONE else " ".join(_TENSOR.findall(names[shapes]))[:MOST_SHAPES]
        return Place(LineKind.WORK, *where, op_name, shown, plain_name(names[name]))

    def book(self, sums: dict[Place, Sums], of_windows: Booked, inside: NDArray[np.bool_]) -> None:
        def by_row(column: NDArray[np.int64]) -> list[int]:
            added = np.zeros(len(self.places), np.int64)
            np.add.at(added, self.group, column[self.works])
            return added.tolist()

        counts = self._counts(inside)
        columns = (
            of_windows.compute + of_windows.copy + of_windows.transfer + of_windows.handed,
            of_windows.unsplit,
            of_windows.waiting,
            of_windows.cpu_bound,
            of_windows.idle,
        )
        for row, (ns, unsplit, waiting, late, idle) in enumerate(zip(*map(by_row, columns), strict=True)):
            if counts[row] or ns or unsplit or waiting:
                of_work = sums[self.places[row]]
                of_work.count += counts[row]
                of_work.ns += ns + unsplit
                of_work.unsplit_ns += unsplit
                of_work.waiting_ns += waiting
            if late or idle:
                self._issue(sums[self._between(row)], late, idle)
        if of_windows.after_ns:
            nowhere = Place(LineKind.ISSUING, "", "", "", "", "after the last work")
            self._issue(sums[nowhere], 0, of_windows.after_ns)

    def _between(self, row: int) -> Place:
        before = "a collective" if self.places[row].kind is LineKind.EXCHANGE else "work"
        return self.issuing[row]._replace(name=f"idle before {before}")

    def _issue(self, found: Sums, late_ns: int, idle_ns: int) -> None:
        """Without a device, whatever is idle is the host's."""
        found.ns += late_ns + (0 if self.has_device else idle_ns)
        found.idle_ns += idle_ns if self.has_device else 0

    def _counts(self, inside: NDArray[np.bool_]) -> list[int]:
        """Calls: of an op that has several kernels, or stretches of its own time, one."""
        op = self.op[self.works]
        called = np.where(op == NONE, self.works, op)
        _, first = np.unique(called, return_index=True)
        first = first[inside[self.works[first]]]
        counts: list[int] = np.bincount(self.group[first], minlength=len(self.places)).tolist()
        return counts


def _begin_in(windows: Sequence[Window], timeline: Timeline) -> NDArray[np.bool_]:
    """Which spans begin in one of the windows, which are in their order."""
    begins, ends = (np.array(each) for each in zip(*((w.start_ns, w.end_ns) for w in windows), strict=True))
    at = np.searchsorted(begins, timeline.spans.start_ns, side="right") - 1
    return (at >= 0) & (timeline.spans.start_ns < ends[at])


def _op_of(timeline: Timeline, known: frozenset[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each span the outermost CPU op around it that is known, else the innermost; and whether it is
    known."""
    spans = timeline.spans
    is_known = np.array([name in known for name in timeline.names], np.bool_)
    ends = np.array([is_handed_to_python(name) for name in timeline.names], np.bool_)[spans.name]
    found = np.full(len(spans), NONE, np.int64)
    innermost = found.copy()
    at = spans.parent.astype(np.int64)
    for _ in range(_MOST_DEEP):
        is_op = (at != NONE) & (spans.kind[at] == SpanKind.OP)
        innermost = np.where(is_op & (innermost == NONE), at, innermost)
        found = np.where(is_op & is_known[spans.name[at]], at, found)
        further = (at != NONE) & ~ends[at]
        if not further.any():
            break
        at = np.where(further, spans.parent[at], NONE)
    return np.where(found == NONE, innermost, found), found != NONE


def _of_collectives(timeline: Timeline) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each span the module that asked for its collective, and which collective it is; NONE for others."""
    spans, found = timeline.spans, timeline.collectives
    origin, kind = (np.full(len(spans), NONE, np.int64) for _ in range(2))
    origin[found.span], kind[found.span] = found.origin, found.op
    return origin, kind
