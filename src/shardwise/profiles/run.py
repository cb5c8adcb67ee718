"""The Timelines of a run's ranks -> RunProfile: numbers per step."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardwise.core.decomposition import decompose
from shardwise.core.difference import CollectiveUse, CpuUse, RunProfile, StepOfRank, Use, Work
from shardwise.core.errors import TraceError
from shardwise.core.intervals import clip, covered_ns, total_ns, union
from shardwise.core.layer_name import any_layer
from shardwise.core.parts import Parts
from shardwise.core.timeline import NONE, SpanKind, Timeline, Window
from shardwise.core.waiting import Loss, SharedCollective, Sharing
from shardwise.profiles.classify import class_of, link_of, only_copies, plain_name
from shardwise.profiles.nesting import own_segments

# a layer's number: equal layers are one line
_STEP_MARK = "ProfilerStep#"


@dataclass(slots=True)
class _Books:
    """Sums over all windows of all ranks."""

    work: dict[Work, Use] = field(default_factory=lambda: defaultdict(Use))
    lines_ns: int = 0
    busy_ns: int = 0


def profile_run(label: str, timelines: Sequence[Timeline], sharing: Sharing) -> RunProfile:
    """timelines: one per rank, as collectives.share() gives them. Raises TraceError for no work."""
    steps = [each for timeline in timelines for each in decompose(timeline)]
    if not steps:
        raise TraceError(
            f"{label}: no kernel and no CPU op was recorded. "
            "Record with ProfilerActivity.CPU, and CUDA where there is a GPU."
        )
    n = len(steps)
    books = _Books()
    for timeline in timelines:
        _book_work(timeline, books)
    work = sorted(books.work.items(), key=lambda pair: (-pair[1].ns, pair[0]))
    link = link_of(dict(timelines[0].facts).get("device", ""))
    launches = [timeline.launches_without_kernel for timeline in timelines]
    return RunProfile(
        label=label,
        facts=timelines[0].facts,
        ranks=tuple(timeline.ranks[0] for timeline in timelines),
        steps=tuple(
            StepOfRank(each.window.rank, each.window.step, each.window.length_ns, each.parts)
            for each in steps
        ),
        has_device=any(lane.is_device for timeline in timelines for lane in timeline.lanes),
        parts=sum((each.parts for each in steps), Parts()).scaled(1 / n),
        communication_ns=sum(each.communication_ns for each in steps) / n,
        overlap_ns=sum(each.overlap_ns for each in steps) / n,
        lines_ns=books.lines_ns / n,
        busy_ns=books.busy_ns / n,
        work=tuple((each, use.per(n)) for each, use in work),
        collectives=_collective_uses(books, [each.window for each in steps], sharing),
        cpu=_cpu_use(timelines),
        sharing=sharing,
        link_bytes_per_s=link,
        too_fast=sum(
            link is not None and (each.bus_bytes_per_s or 0.0) > link for each in sharing.collectives
        ),
        losses=_losses(timelines),
        without_kernel=(sum(without for without, _ in launches), sum(count for _, count in launches)),
    )


def _losses(timelines: Sequence[Timeline]) -> tuple[Loss, ...]:
    counts: Counter[str] = Counter()
    for timeline in timelines:
        for loss in timeline.losses:
            counts[loss.what] += loss.count
    return tuple(Loss(count, what) for what, count in counts.most_common())


# --------------------------------------------------------------------------------------------- work


def _book_work(timeline: Timeline, books: _Books) -> None:
    spans = timeline.spans
    works = np.flatnonzero(spans.kind <= SpanKind.COPY)
    if not len(works):
        return
    op = _op_of(timeline)[works]
    copies = _inside_copies(timeline)
    combined = np.stack(
        (
            spans.kind[works].astype(np.int64),
            spans.name[works].astype(np.int64),
            np.where(op == NONE, NONE, spans.name[op]),
            np.where(op == NONE, NONE, spans.shapes[op]),
            np.where(op == NONE, False, copies[op]).astype(np.int64),
            _of_collectives(timeline, timeline.collectives.op)[works],
            _of_collectives(timeline, timeline.collectives.origin)[works],
        ),
        axis=1,
    )
    kinds, group = np.unique(combined, axis=0, return_inverse=True)
    group = group.reshape(-1)
    known = [_work(timeline, row) for row in kinds.tolist()]
    start_ns, end_ns = spans.start_ns[works], spans.end_ns[works]
    busy = union(start_ns, end_ns)
    for window in timeline.windows:
        inside = np.maximum(0, np.minimum(end_ns, window.end_ns) - np.maximum(start_ns, window.start_ns))
        starts = (start_ns >= window.start_ns) & (start_ns < window.end_ns)
        ns = np.bincount(group, weights=inside, minlength=len(known))
        counts = np.bincount(group, weights=starts, minlength=len(known))
        for work, its_ns, count in zip(known, ns.tolist(), counts.tolist(), strict=True):
            if its_ns or count:
                books.work[work] += Use(count, its_ns)
        books.lines_ns += int(inside.sum())
        books.busy_ns += total_ns(clip(busy, window.start_ns, window.end_ns))


def _work(timeline: Timeline, row: list[int]) -> Work:
    kind, name, op, shapes, is_copy, collective, origin = row
    text = ("" if number == NONE else timeline.names[number] for number in (op, shapes, origin))
    op_name, shapes_text, asked = text
    if collective != NONE:
        what = timeline.names[collective]
        return Work(SpanKind.COLLECTIVE.name, any_layer(asked), "", what, "communication", False)
    kernel = plain_name(timeline.names[name])
    moves = bool(is_copy) or (kind == SpanKind.COPY and "DtoD" in kernel)
    return Work(SpanKind(kind).name, op_name, shapes_text, kernel, class_of(op_name, kernel), moves)


def _of_collectives(timeline: Timeline, column: NDArray[np.int32]) -> NDArray[np.int64]:
    """A column of the collectives for every span."""
    values = np.full(len(timeline.spans), NONE, np.int64)
    values[timeline.collectives.span] = column
    return values


def _op_of(timeline: Timeline) -> NDArray[np.int64]:
    """For each span the innermost CPU op around it, past ranges and launches."""
    spans = timeline.spans
    at = spans.parent.astype(np.int64)
    for _ in range(64):
        passes = (at != NONE) & (spans.kind[at] != SpanKind.OP)
        if not passes.any():
            break
        at[passes] = spans.parent[at[passes]]
    return at


def _inside_copies(timeline: Timeline) -> NDArray[np.bool_]:
    """Which CPU spans are, or lie inside, an op that only copies."""
    spans = timeline.spans
    named: NDArray[np.bool_] = np.array([only_copies(name) for name in timeline.names], np.bool_)
    copies: NDArray[np.bool_] = named[spans.name] & (spans.kind == SpanKind.OP)
    parent = spans.parent
    has_parent = np.flatnonzero((parent != NONE) & (spans.kind >= SpanKind.OP))
    for _ in range(64):
        grown = copies.copy()
        grown[has_parent] |= copies[parent[has_parent]]
        if np.array_equal(grown, copies):
            break
        copies = grown
    return copies


# --------------------------------------------------------------------------------------------- collectives


def _collective_uses(books: _Books, windows: Sequence[Window], sharing: Sharing) -> tuple[CollectiveUse, ...]:
    """Waiting and transfer are of the sets that are known, which may be less than all of the op's time."""
    n = len(windows)
    shared_by_op: dict[tuple[str, str], list[SharedCollective]] = defaultdict(list)
    for shared in sharing.collectives:
        if _is_inside(shared, windows):
            shared_by_op[shared.op, any_layer(shared.origin)].append(shared)
    totals: dict[tuple[str, str], Use] = defaultdict(Use)
    for work, use in books.work.items():
        if work.kind == SpanKind.COLLECTIVE.name:
            totals[work.name, work.op] += use
    uses = []
    for (op, origin), total in sorted(totals.items(), key=lambda pair: -pair[1].ns):
        known = shared_by_op.get((op, origin), [])
        if not known:
            uses.append(CollectiveUse(op, origin, total.per(n), None, None, None, None))
            continue
        waiting_ns = sum(each.total_waiting_ns for each in known)
        own_ns = sum(each.total_ns - each.total_waiting_ns for each in known)
        speed = _bus_bytes_per_s(known)
        uses.append(
            CollectiveUse(op, origin, total.per(n), waiting_ns / n, own_ns / n, speed, _latest(known))
        )
    return tuple(uses)


def _bus_bytes_per_s(known: Sequence[SharedCollective]) -> float | None:
    wire = [each.wire_bytes for each in known if each.wire_bytes is not None]
    transfer_ns = sum(each.transfer_ns for each in known)
    return sum(wire) / (transfer_ns / 1e9) if len(wire) == len(known) and transfer_ns > 0 else None


def _is_inside(shared: SharedCollective, windows: Sequence[Window]) -> bool:
    member = shared.members[0]
    return any(
        window.rank == member.rank and window.start_ns <= member.start_ns < window.end_ns
        for window in windows
    )


def _latest(shared: Sequence[SharedCollective]) -> tuple[int, float, str] | None:
    caused: Counter[int] = Counter()
    for each in shared:
        caused[each.last_rank] += each.total_waiting_ns
    total = sum(caused.values())
    if not total:
        return None
    rank, ns = caused.most_common(1)[0]
    doing: Counter[str] = Counter()
    for each in shared:
        if each.last_rank == rank and each.blame is not None:
            doing[each.blame.doing] += each.total_waiting_ns
    return rank, ns / total, doing.most_common(1)[0][0] if doing else ""


# --------------------------------------------------------------------------------------------- the CPU


def _cpu_use(timelines: Sequence[Timeline]) -> CpuUse:
    ops, launches = Use(), Use()
    by_op: dict[str, Use] = defaultdict(Use)
    n = 0
    for timeline in timelines:
        spans, names = timeline.spans, timeline.names
        windows = np.array(_cpu_windows(timeline), np.int64).reshape(-1, 2)
        n += len(windows)
        within = np.zeros(len(spans), np.int64)
        for begin_ns, end_ns in windows.tolist():
            within += (spans.start_ns >= begin_ns) & (spans.start_ns < end_ns)
        chosen = np.flatnonzero(spans.kind == SpanKind.OP)
        calls = np.flatnonzero((spans.kind == SpanKind.LAUNCH) & (within > 0))
        took_ns = (spans.end_ns[calls] - spans.start_ns[calls]) * within[calls]
        launches += Use(int(within[calls].sum()), int(took_ns.sum()))
        segments = np.array(list(own_segments(spans, chosen)), np.int64).reshape(-1, 3)
        own_ns = covered_ns(union(windows[:, 0], windows[:, 1]), segments[:, 1], segments[:, 2])
        counts = np.zeros(len(names), np.int64)
        sums_ns = np.zeros(len(names), np.int64)
        np.add.at(counts, spans.name[chosen], within[chosen])
        np.add.at(sums_ns, spans.name[segments[:, 0]], own_ns)
        for number in np.union1d(np.flatnonzero(counts), spans.name[segments[:, 0]]).tolist():
            use = Use(int(counts[number]), int(sums_ns[number]))
            ops += use
            by_op[names[number]] += use
    n = max(1, n)
    lines = sorted(by_op.items(), key=lambda pair: (-pair[1].ns, pair[0]))
    return CpuUse(ops.per(n), launches.per(n), tuple((name, use.per(n)) for name, use in lines))


def _cpu_windows(timeline: Timeline) -> list[tuple[int, int]]:
    """The marks of its steps on the CPU; without them, from its first op to its last."""
    spans = timeline.spans
    steps = {f"{_STEP_MARK}{window.step}" for window in timeline.windows if window.step is not None}
    marked = np.array([name in steps for name in timeline.names], np.bool_)
    marks = np.flatnonzero((spans.kind == SpanKind.RANGE) & marked[spans.name])
    if len(marks):
        return sorted((int(spans.start_ns[mark]), int(spans.end_ns[mark])) for mark in marks)
    ops = np.flatnonzero((spans.kind == SpanKind.OP) | (spans.kind == SpanKind.LAUNCH))
    return [(int(spans.start_ns[ops].min()), int(spans.end_ns[ops].max()))] if len(ops) else []
