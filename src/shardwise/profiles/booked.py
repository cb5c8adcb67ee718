"""Steps' windows booked on their spans: each instant on one of them, so that what they have adds up to the
windows' parts (core/decomposition.py), to the nanosecond.

Of several spans of one part at once, the one that began first has the instant until it ends; which part has
it, the parts' order says. Idle time is booked on the work that starts next: the host was late with it, or the
device. Without a device, idle time inside the call of a collective is the collective's: its backend's thread
has it, or hands it back.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardwise.core.decomposition import WorkSets, not_yet_launched
from shardwise.core.intervals import EMPTY, Intervals, common, complement, covered_ns, union
from shardwise.core.timeline import NONE, SpanKind, Timeline, Window
from shardwise.profiles.classify import issues_collective

Nanoseconds = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Booked:
    """Nanoseconds of windows by span of the Timeline. cpu_bound, idle: of gaps, by the span that starts
    next; handed: of gaps inside a collective's call on the CPU, by the collective; after_ns: of the gaps that
    nothing follows."""

    compute: Nanoseconds
    transfer: Nanoseconds
    unsplit: Nanoseconds
    waiting: Nanoseconds
    copy: Nanoseconds
    cpu_bound: Nanoseconds
    idle: Nanoseconds
    handed: Nanoseconds
    after_ns: int

    @property
    def total_ns(self) -> int:
        busy = (self.compute, self.transfer, self.unsplit, self.waiting, self.copy)
        gaps = (self.cpu_bound, self.idle, self.handed)
        return int(sum(each.sum() for each in (*busy, *gaps))) + self.after_ns


def calls_on_cpu(timeline: Timeline, rank: int) -> Intervals:
    """When a rank's CPU is in the call of a collective; nowhere where there is a device."""
    if any(lane.is_device for lane in timeline.lanes):
        return EMPTY
    spans = timeline.spans
    issues = np.array([issues_collective(name) for name in timeline.names], np.bool_)[spans.name]
    chosen = timeline.of_rank(rank) & issues & (spans.kind >= SpanKind.OP)
    return union(spans.start_ns[chosen], spans.end_ns[chosen])


def booked(
    timeline: Timeline, sets: WorkSets, calls: Intervals, rank: int, windows: Sequence[Window]
) -> Booked:
    """windows: of the rank, none of them beginning before the one before it has ended (see apart()). sets:
    its work_sets(); calls: its calls_on_cpu()."""
    spans, found = timeline.spans, timeline.collectives
    own = timeline.of_rank(rank)
    times = np.array([(each.start_ns, each.end_ns) for each in windows], np.int64).reshape(-1, 2)
    arrival_ns = np.full(len(spans), NONE, np.int64)
    arrival_ns[found.span] = found.arrival_ns
    is_collective = own & (spans.kind == SpanKind.COLLECTIVE)
    known = is_collective & (arrival_ns != NONE)
    cut_ns = np.clip(arrival_ns, spans.start_ns, spans.end_ns)
    # as work_sets() has them: which spans, and from when until when
    parts = (
        (own & (spans.kind == SpanKind.COMPUTE), spans.start_ns, spans.end_ns, sets.compute),
        (known, cut_ns, spans.end_ns, sets.transfer),
        (is_collective & ~known, spans.start_ns, spans.end_ns, sets.unsplit),
        (known, spans.start_ns, cut_ns, sets.waiting),
        (own & (spans.kind == SpanKind.COPY), spans.start_ns, spans.end_ns, sets.copy),
    )
    above: Intervals = EMPTY
    columns: list[Nanoseconds] = []
    for chosen, start_ns, end_ns, covered in parts:
        columns.append(_exclusive(np.flatnonzero(chosen), start_ns, end_ns, above, times))
        above = union(*np.concatenate((above, covered)).T)
    compute, transfer, unsplit, waiting, copy = columns
    gaps = common(times, complement(above, times.min(initial=0), times.max(initial=0)))
    works = np.flatnonzero(own & (spans.kind <= SpanKind.COPY))
    works = works[np.argsort(spans.start_ns[works], kind="stable")]
    following, late_ns = not_yet_launched(gaps, spans.start_ns[works], spans.launched_ns[works])
    cpu_bound, idle, handed = (np.zeros(len(spans), np.int64) for _ in range(3))
    collectives = works[is_collective[works]]
    inside_ns = covered_ns(calls, gaps[:, 0], gaps[:, 1]) if len(collectives) else np.zeros_like(late_ns)
    before = np.searchsorted(spans.start_ns[collectives], gaps[:, 1], side="right") - 1
    inside_ns = np.where(before >= 0, inside_ns, 0)
    np.add.at(handed, collectives[before[inside_ns > 0]], inside_ns[inside_ns > 0])
    rest_ns = gaps[:, 1] - gaps[:, 0] - inside_ns
    late_ns = np.minimum(late_ns, rest_ns)
    is_followed = following < len(works)
    np.add.at(cpu_bound, works[following[is_followed]], late_ns[is_followed])
    np.add.at(idle, works[following[is_followed]], (rest_ns - late_ns)[is_followed])
    after_ns = int(rest_ns[~is_followed].sum())
    return Booked(compute, transfer, unsplit, waiting, copy, cpu_bound, idle, handed, after_ns)


def apart(windows: Iterable[Window]) -> Iterator[tuple[Window, ...]]:
    """A rank's windows in as few rows as it takes for none to begin before the one before it has ended: one,
    where steps don't overlap."""
    rows: list[list[Window]] = []
    for window in sorted(windows, key=lambda each: (each.start_ns, each.end_ns)):
        row = next((each for each in rows if each[-1].end_ns <= window.start_ns), None)
        if row is None:
            rows.append(row := [])
        row.append(window)
    yield from map(tuple, rows)


def _exclusive(
    chosen: NDArray[np.int64], start_ns: Nanoseconds, end_ns: Nanoseconds, above: Intervals, times: Intervals
) -> Nanoseconds:
    """Of each chosen span what of the windows' times neither those before it nor what is above it cover."""
    made = np.zeros(len(start_ns), np.int64)
    chosen = chosen[end_ns[chosen] > start_ns[chosen]]
    if not len(chosen):
        return made
    chosen = chosen[np.argsort(start_ns[chosen], kind="stable")]
    until_ns = np.maximum.accumulate(end_ns[chosen])
    reached_ns = np.concatenate((start_ns[chosen][:1], until_ns[:-1]))
    begin_ns = np.maximum(start_ns[chosen], reached_ns)
    stop_ns = np.maximum(begin_ns, end_ns[chosen])
    hidden_ns = covered_ns(common(times, above), begin_ns, stop_ns)
    made[chosen] = covered_ns(times, begin_ns, stop_ns) - hidden_ns
    return made
