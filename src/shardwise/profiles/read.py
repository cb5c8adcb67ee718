"""One trace file -> the Timeline of one rank.

Its collectives are calls.py's; the work of a run without devices is cpu_work.py's.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.core.errors import TraceError
from shardwise.core.timeline import NONE, Lane, SpanKind, Spans, Timeline, Window
from shardwise.core.waiting import Loss
from shardwise.profiles.calls import collectives_of
from shardwise.profiles.columns import Columns, integer
from shardwise.profiles.container import Damage, text_pieces
from shardwise.profiles.cpu_work import with_cpu_work
from shardwise.profiles.events import CUT_OFF, EventStream, Header
from shardwise.profiles.nesting import parents
from shardwise.profiles.places import Nodes, with_places

_STEP = re.compile(r"ProfilerStep#(\d{1,9})$")
_RANK_IN_NAME = re.compile(r"(?:rank|worker|device)[-_ ]?(\d{1,6})", re.IGNORECASE)
# A file may unpack to far more than it weighs; what a Timeline may take is bounded: 65 bytes a span, and its
# names.
MOST_SPANS = 100_000_000
MOST_NAMES_LENGTH = 512 << 20


def read_timeline(path: Path, *, rank: int | None = None) -> Timeline:
    """The file's Timeline. rank: of which rank it is, where neither the file nor its name ("rank3.json")
    says.

    Raises TraceError where there is nothing in it to read.
    """
    damage = Damage()
    stream = EventStream(text_pieces(path, damage))
    columns = Columns()
    for batch in stream:
        columns.add(batch)
        if columns.n > MOST_SPANS or columns.names.length > MOST_NAMES_LENGTH:
            most = f"{MOST_SPANS:,} spans, or {MOST_NAMES_LENGTH >> 20} MiB of different names"
            raise TraceError(f"{path}: has more than {most}. Record fewer steps.")
    losses = [Loss(count, what) for what, count in sorted((stream.lost + columns.lost).items())]
    if damage.reason:
        losses.append(Loss(1, damage.reason))
    if not columns.n:
        lost = "; ".join(f"{loss.count} {loss.what}" for loss in losses)
        said = f": {lost}" if lost else ""
        raise TraceError(
            f"{path}: has no event that a Timeline is made of{said}. Record with torch.profiler."
        )
    timeline = _assemble(columns, stream.header, _rank_of(path, stream.header, rank), tuple(losses))
    return _without_cut_steps(timeline) if damage.reason or stream.lost[CUT_OFF] else timeline


def _rank_of(path: Path, header: Header, given: int | None) -> int:
    if header.job.rank is not None:
        return header.job.rank
    named = _RANK_IN_NAME.search(path.name)
    return int(named[1]) if named else given or 0


def _assemble(columns: Columns, header: Header, rank: int, losses: tuple[Loss, ...]) -> Timeline:
    lane, kind, name = columns.column("lane"), columns.column("kind"), columns.column("name")
    start_ns, end_ns = columns.column("start"), columns.column("end")
    first_ns = int(start_ns.min())
    origin_ns = first_ns + max(0, integer(header.base_ns))
    start_ns -= first_ns
    end_ns -= first_ns
    names = tuple(columns.names)
    is_cpu = np.array([on_cpu for on_cpu, _, _ in columns.lanes], np.bool_)[lane]
    launch = _launches(kind, columns.column("correlation"))
    parent = parents(lane, start_ns, end_ns, is_cpu)
    _place_device_spans(parent, kind, np.flatnonzero(~is_cpu), launch, columns.column("external"))
    lanes = [Lane(rank, not on_cpu, str(process), str(thread)) for on_cpu, process, thread in columns.lanes]
    launched_ns = np.where(launch == NONE, NONE, start_ns[launch])
    shapes, n_bytes = columns.column("shapes"), columns.column("bytes")
    module, step_pass = np.full(len(lane), NONE, np.int32), np.full(len(lane), NONE, np.int8)
    times = (start_ns, end_ns, launched_ns)
    spans = Spans(lane, kind, name, shapes, *times, parent, n_bytes, module, step_pass)
    unused = (kind == SpanKind.LAUNCH) & np.array([_calls_for_work(text) for text in names], np.bool_)[name]
    n_launches = int(unused.sum())
    unused[launch[launch != NONE]] = False
    collectives, groups, names = collectives_of(columns.collectives, spans, names, header)
    nodes = Nodes(columns.column("node"), columns.column("forward_thread"))
    spans, names = with_places(spans, names, nodes)
    timeline = Timeline(
        lanes=tuple(lanes),
        names=names,
        spans=spans,
        collectives=collectives,
        groups=groups,
        windows=(),
        origin_ns=origin_ns,
        facts=_facts(header),
        losses=losses,
        launches_without_kernel=(int(unused.sum()), n_launches),
    )
    if not any(each.is_device for each in lanes):
        timeline = with_cpu_work(timeline)
    return replace(timeline, windows=_windows(timeline, rank))


def _calls_for_work(name: str) -> bool:
    return "LaunchKernel" in name or "launchKernel" in name.lower()


def _launches(kind: NDArray[Any], correlation: NDArray[Any]) -> NDArray[np.int64]:
    """For each device span the span of the call that launched it, by correlation."""
    launch = np.full(len(kind), NONE, np.int64)
    calls = np.flatnonzero((kind == SpanKind.LAUNCH) & (correlation > 0))
    works = np.flatnonzero((kind <= SpanKind.COPY) & (correlation > 0))
    launch[works] = _with_same(correlation, works, calls)
    return launch


def _place_device_spans(
    parent: NDArray[np.int32],
    kind: NDArray[Any],
    works: NDArray[np.int64],
    launch: NDArray[np.int64],
    external: NDArray[Any],
) -> None:
    """Device spans belong to what stood around their launch; where that isn't known, to the CPU op of the
    same external id."""
    launched = works[launch[works] != NONE]
    parent[launched] = parent[launch[launched]]
    ops = np.flatnonzero((kind == SpanKind.OP) & (external > 0))
    orphans = works[(parent[works] == NONE) & (external[works] > 0)]
    parent[orphans] = _with_same(external, orphans, ops)


def _with_same(ids: NDArray[Any], wanted: NDArray[np.int64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each wanted span the first of `among` with the same id; NONE where there is none."""
    first = np.full(len(wanted), NONE, np.int64)
    if len(among):
        among = among[np.argsort(ids[among], kind="stable")]
        at = np.minimum(np.searchsorted(ids[among], ids[wanted]), len(among) - 1)
        known = ids[among[at]] == ids[wanted]
        first[known] = among[at[known]]
    return first


def _facts(header: Header) -> tuple[tuple[str, str], ...]:
    devices = Counter(str(device.name)[:100] for device in header.devices if device.name is not None)
    listed = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in devices.items())
    backend, world_size = header.job.backend, header.job.world_size
    facts = (
        ("device", listed or None),
        ("world size", world_size),
        ("backend", None if backend is None else str(backend)[:100]),
    )
    return tuple((name, str(value)) for name, value in facts if value is not None)


def _windows(timeline: Timeline, rank: int) -> tuple[Window, ...]:
    """Steps as the device sees them: from the first work launched in a step to the first launched in the
    next; the last one ends with its work. Without marks: all work, as one window. Without a device: the marks
    themselves."""
    spans = timeline.spans
    works = np.flatnonzero(spans.kind <= SpanKind.COPY)
    if not len(works):
        return ()
    whole = (Window(rank, None, int(spans.start_ns[works].min()), int(spans.end_ns[works].max())),)
    marks = _step_marks(timeline)
    if not marks:
        return whole
    if not any(lane.is_device for lane in timeline.lanes):
        return tuple(Window(rank, step, begin, end) for step, begin, end in marks if end > begin)
    launched_ns = spans.launched_ns[works]
    steps = []
    for step, begin, end in marks:
        launched = works[(launched_ns >= begin) & (launched_ns < end)]
        if len(launched):
            steps.append((step, int(spans.start_ns[launched].min()), int(spans.end_ns[launched].max())))
    if not steps:
        return whole
    ends = [*(begin for _, begin, _ in steps[1:]), steps[-1][2]]
    return tuple(
        Window(rank, step, begin, end)
        for (step, begin, _), end in zip(steps, ends, strict=True)
        if end > begin
    )


def _without_cut_steps(timeline: Timeline) -> Timeline:
    """Of a file that ends too early only the steps that are as full as the fullest: the others' numbers would
    be taken for a step's. What there is of one step alone stays."""
    spans = timeline.spans
    works = np.flatnonzero(spans.kind <= SpanKind.COPY)
    at_ns = np.where(spans.launched_ns[works] == NONE, spans.start_ns[works], spans.launched_ns[works])
    count_of = {
        step: int(((at_ns >= begin) & (at_ns < end)).sum()) for step, begin, end in _step_marks(timeline)
    }
    fullest = max(count_of.values(), default=0)
    whole = tuple(
        window for window in timeline.windows if window.step is None or count_of[window.step] == fullest
    )
    n_cut = len(timeline.windows) - len(whole)
    if not n_cut:
        return timeline
    loss = Loss(n_cut, "step of which the file has a part only, and which is left out")
    return replace(timeline, windows=whole, losses=(*timeline.losses, loss))


def _step_marks(timeline: Timeline) -> list[tuple[int, int, int]]:
    """(step, start, end) of the profiler's marks, in order of time."""
    spans = timeline.spans
    matches = ((number, _STEP.search(name)) for number, name in enumerate(timeline.names))
    step_of = {number: int(match[1]) for number, match in matches if match is not None}
    marks = np.flatnonzero((spans.kind == SpanKind.RANGE) & np.isin(spans.name, list(step_of)))
    marks = marks[np.argsort(spans.start_ns[marks], kind="stable")]
    steps = [step_of[name] for name in spans.name[marks].tolist()]
    return list(zip(steps, spans.start_ns[marks].tolist(), spans.end_ns[marks].tolist(), strict=True))
