"""Decomposition: a step's window split into parts that add up to it, to the nanosecond.

In order of priority, so that no instant counts twice (intervals are half-open; all streams of a rank's device
together):

    compute                kernels that are neither communication nor copies
    exposed transfer       a collective after its last rank arrived (A), and no compute
    exposed communication  a collective of which A isn't known (one rank's file, broadcasts, sets that don't
                           match), and no compute
    exposed waiting        a collective before A, and neither of these
    exposed copy           copies and fills, and none of these
    CPU-bound idle         nothing runs, and the work that runs next had not been launched yet
    other idle             nothing runs, though the work that runs next had been launched; and what no launch
                           is known of

exposed transfer + communication + waiting = |U(comm)| - |U(comm) & U(compute)|, the usual "exposed
communication".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardwise.core.intervals import Intervals, clip, layers, total_ns, union
from shardwise.core.parts import Parts
from shardwise.core.timeline import NONE, SpanKind, Timeline, Window


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A window's parts, and its unions; communication_ns and compute_ns overlap by overlap_ns."""

    window: Window
    parts: Parts
    communication_ns: int
    overlap_ns: int
    copy_ns: int

    @property
    def overlap_share(self) -> float | None:
        """Of the time in communication, the share that compute hides."""
        return self.overlap_ns / self.communication_ns if self.communication_ns else None


@dataclass(frozen=True, slots=True)
class WorkSets:
    """When a rank computes, transfers, waits, communicates where these can't be told apart, and copies."""

    compute: Intervals
    transfer: Intervals
    unsplit: Intervals
    waiting: Intervals
    copy: Intervals


def work_sets(timeline: Timeline, rank: int) -> WorkSets:
    """Of one rank, over all its lanes."""
    spans, collectives = timeline.spans, timeline.collectives
    own = timeline.of_rank(rank)

    def of(kind: SpanKind) -> Intervals:
        chosen = own & (spans.kind == kind)
        return union(spans.start_ns[chosen], spans.end_ns[chosen])

    arrival_ns = np.full(len(spans), NONE, np.int64)
    arrival_ns[collectives.span] = collectives.arrival_ns
    collective = own & (spans.kind == SpanKind.COLLECTIVE)
    known = collective & (arrival_ns != NONE)
    unknown = collective & (arrival_ns == NONE)
    cut = np.clip(arrival_ns[known], spans.start_ns[known], spans.end_ns[known])
    return WorkSets(
        compute=of(SpanKind.COMPUTE),
        transfer=union(cut, spans.end_ns[known]),
        unsplit=union(spans.start_ns[unknown], spans.end_ns[unknown]),
        waiting=union(spans.start_ns[known], cut),
        copy=of(SpanKind.COPY),
    )


def decompose(timeline: Timeline) -> tuple[Decomposition, ...]:
    """Every window of every rank."""
    return tuple(
        decomposition
        for rank in timeline.ranks
        for decomposition in _of_rank(timeline, rank, work_sets(timeline, rank), timeline.windows_of(rank))
    )


def _of_rank(
    timeline: Timeline, rank: int, sets: WorkSets, windows: tuple[Window, ...]
) -> list[Decomposition]:
    spans = timeline.spans
    works = timeline.of_rank(rank) & (spans.kind <= SpanKind.COPY)
    order = np.argsort(spans.start_ns[works], kind="stable")
    start_ns, launched_ns = spans.start_ns[works][order], spans.launched_ns[works][order]
    begins, ends = np.concatenate((sets.transfer, sets.unsplit, sets.waiting)).T
    communication = union(begins, ends)
    decompositions = []
    for window in windows:
        lo, hi = window.start_ns, window.end_ns
        by_priority = (sets.compute, sets.transfer, sets.unsplit, sets.waiting, sets.copy)
        *busy, idle = layers(by_priority, lo, hi)
        cpu_bound_ns = int(not_yet_launched(idle, start_ns, launched_ns)[1].sum())
        compute, transfer, unsplit, waiting, copy = map(total_ns, busy)
        parts = Parts(compute, transfer, unsplit, waiting, copy, cpu_bound_ns, total_ns(idle) - cpu_bound_ns)
        inside = total_ns(clip(communication, lo, hi))
        copy_ns = total_ns(clip(sets.copy, lo, hi))
        decompositions.append(Decomposition(window, parts, inside, inside - int(parts.exposed_ns), copy_ns))
    return decompositions


def not_yet_launched(
    idle: Intervals, start_ns: NDArray[np.int64], launched_ns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each idle gap the work that starts next (its number; len(start_ns): none), and how much of the gap
    lies before that work's launch, 0 where no launch is known. start_ns: sorted."""
    following = np.searchsorted(start_ns, idle[:, 1])
    if not len(start_ns):
        return following, np.zeros(len(idle), np.int64)
    launch = launched_ns[np.minimum(following, len(start_ns) - 1)]
    unknown = (following == len(start_ns)) | (launch == NONE)
    blamed = np.where(unknown, idle[:, 0], np.clip(launch, idle[:, 0], idle[:, 1]))
    return following, blamed - idle[:, 0]
