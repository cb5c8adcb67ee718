"""One trace file -> the Timeline of one rank.

CPU-only runs (gloo) have no device lanes. There the collectives are the backend's own ranges (`gloo:all_reduce`, from the start in a
worker thread to the end), and compute is what the CPU ops of the other threads do themselves, without the ops that only wait.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from shardwise.core.errors import TraceError
from shardwise.core.timeline import NONE, Collectives, Group, Lane, SpanKind, Spans, Timeline, Window
from shardwise.core.waiting import Loss
from shardwise.profiles import classify
from shardwise.profiles.container import Damage, text_pieces
from shardwise.profiles.events import Args, EventStream, Header
from shardwise.profiles.nesting import own_segments, parents

_OURS = re.compile(r"shardwise\.\w+\|([^ (]+)")
_MODULE = re.compile(r"module: (.+)")
_STEP = re.compile(r"ProfilerStep#(\d{1,9})$")
_RANK_IN_NAME = re.compile(r"(?:rank|worker|device)[-_ ]?(\d{1,6})", re.IGNORECASE)
_NS_PER_US = 1000
# A file may unpack to far more than it weighs; what a Timeline may take is bounded: 60 bytes a span, and its names.
MOST_SPANS = 100_000_000
MOST_NAME = 4096
MOST_NAMES_LENGTH = 512 << 20
_BLANK = re.compile(rb"\s+")
_MOST_TIME_NS = 1 << 62
_MOST_LENGTH_NS = 1 << 50  # 13 days: sums of them stay within 64 bits
# what args that a stranger wrote may raise
_ODD = (
    msgspec.DecodeError,
    msgspec.ValidationError,
    RecursionError,
    UnicodeDecodeError,
    TypeError,
    OverflowError,
)


class _Numbers(dict[Any, int]):
    """Numbers things in the order in which they are first seen."""

    def __missing__(self, key: Any) -> int:
        self[key] = number = len(self)
        return number


def read_timeline(path: Path, *, rank: int | None = None) -> Timeline:
    """The file's Timeline. rank: of which rank it is, where neither the file nor its name ("rank3.json") says.

    Raises TraceError where there is nothing in it to read.
    """
    damage = Damage()
    stream = EventStream(text_pieces(path, damage))
    columns = _Columns()
    for batch in stream:
        columns.add(batch)
        if columns.n > MOST_SPANS or columns.names_length > MOST_NAMES_LENGTH:
            raise TraceError(
                f"{path}: has more than {MOST_SPANS:,} spans, or {MOST_NAMES_LENGTH >> 20} MiB of different names. Record fewer steps."
            )
    lost = stream.lost + columns.lost
    losses = [Loss(count, what) for what, count in sorted(lost.items())]
    if damage.reason:
        losses.append(Loss(1, damage.reason))
    if not columns.n:
        said = "; ".join(f"{loss.count} {loss.what}" for loss in losses)
        raise TraceError(
            f"{path}: has no event that a Timeline is made of{': ' + said if said else ''}. Record with torch.profiler."
        )
    header = stream.header
    own_rank = _rank_of(path, header, rank)
    return _assemble(columns, header, own_rank, tuple(losses))


def _rank_of(path: Path, header: Header, given: int | None) -> int:
    if header.distributed is not None and header.distributed.rank is not None:
        return header.distributed.rank
    named = _RANK_IN_NAME.search(path.name)
    return int(named[1]) if named else given or 0


class _Names(_Numbers):
    """Numbers names, cut to what anybody reads; `length` of all of them."""

    length = 0

    def __missing__(self, key: str) -> int:
        if len(key) > MOST_NAME:
            return self[f"{key[: MOST_NAME - 1]}…"]
        self.length += len(key)
        return super().__missing__(key)


class _Columns:
    """Batches of events as growing columns."""

    def __init__(self) -> None:
        self.n = 0
        self.lost: Counter[str] = Counter()
        self.names = _Names()
        self.lanes = _Numbers()
        self.collectives: list[tuple[int, Any]] = []  # (span, args)
        self.parts: dict[str, list[NDArray[Any]]] = {
            key: []
            for key in ("lane", "kind", "name", "shapes", "start", "end", "correlation", "external", "bytes")
        }
        self._kinds: dict[tuple[str, str], int | None] = {}
        self._shapes = _Shapes(self.names)

    def add(self, batch: Sequence[Any]) -> None:
        kinds = self._kinds
        events, found = [], []
        unfinished = 0
        for event in batch:
            if event.ph != "X":
                unfinished += event.ph == "B"
                continue
            key = (event.cat, event.name[:MOST_NAME])
            try:
                kind = kinds[key]
            except KeyError:
                known = classify.kind_of(*key)
                kind = kinds[key] = None if known is None else int(known)
            if kind is not None:
                events.append(event)
                found.append(kind)
        if unfinished:
            self.lost["events of the B/E form, which PyTorch doesn't write"] += unfinished
        if events:
            self._append(events, found)

    def _append(self, events: list[Any], kinds: list[int]) -> None:
        kind = np.array(kinds, np.int8)
        start, start_known = _nanoseconds([event.ts for event in events])
        length, length_known = _nanoseconds([event.dur for event in events])
        # a range may be empty; work of no length, or at no time, is a record that was never filled in
        is_work = kind <= SpanKind.COPY
        good = (
            start_known
            & length_known
            & (length >= 0)
            & (length <= _MOST_LENGTH_NS)
            & (start != 0)
            & ~(is_work & (length == 0))
        )
        if not good.all():
            self.lost["events without a time or a duration"] += int((~good).sum())
            events = [event for event, keep in zip(events, good.tolist(), strict=True) if keep]
            kind, start, length = kind[good], start[good], length[good]
        names, lanes, shapes = self.names, self.lanes, self._shapes
        args = [event.args for event in events]
        cpu = kind >= SpanKind.OP
        parts = self.parts
        # a gloo collective stands on a CPU thread
        on_cpu = [
            bool(c) or e.cat.lower() == "user_annotation" for c, e in zip(cpu.tolist(), events, strict=True)
        ]
        parts["lane"].append(
            np.array([lanes[c, e.pid, e.tid] for c, e in zip(on_cpu, events, strict=True)], np.int32)
        )
        parts["kind"].append(kind)
        parts["name"].append(np.array([names[event.name] for event in events], np.int32))
        parts["shapes"].append(
            np.array(
                [NONE if a is None or a.dims is UNSET else shapes[bytes(a.dims)] for a in args], np.int32
            )
        )
        parts["start"].append(start)
        parts["end"].append(start + length)
        parts["correlation"].append(_integers([None if a is None else a.correlation for a in args]))
        parts["external"].append(
            _integers(
                [
                    None if a is None else a.external_id if a.external_id is not None else a.old_external_id
                    for a in args
                ]
            )
        )
        parts["bytes"].append(_integers([None if a is None else a.n_bytes for a in args]))
        for index in np.flatnonzero(kind == SpanKind.COLLECTIVE).tolist():
            self.collectives.append((self.n + index, _owned(args[index])))
        self.n += len(events)

    @property
    def names_length(self) -> int:
        return self.names.length

    def column(self, key: str) -> NDArray[Any]:
        """The whole column; its parts are given up."""
        return np.concatenate(self.parts.pop(key))


def _owned(args: Args | None) -> Args | None:
    """The args without a hold on the piece of text that they came from."""
    if args is not None:
        for name in ("dims", "types", "group_ranks"):
            raw = getattr(args, name)
            if raw is not UNSET:
                setattr(args, name, raw.copy())
    return args


class _Shapes(dict[bytes, int]):
    """A shape's JSON -> its number among the names, without blanks and cut to what anybody reads."""

    def __init__(self, names: _Names) -> None:
        super().__init__()
        self._names = names

    def __missing__(self, raw: bytes) -> int:
        self[raw] = number = self._names[_BLANK.sub(b"", raw[:MOST_NAME]).decode("utf-8", "replace")]
        return number


def _nanoseconds(times_us: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(nanoseconds, which are times at all), exact for what the text says up to the nanosecond."""
    try:
        us = np.array(times_us, np.float64)
        is_exact = not any(isinstance(time, Decimal) for time in times_us[:1])
    except (TypeError, ValueError):
        is_exact = False
    if is_exact:
        known = np.isfinite(us) & (np.abs(us) < _MOST_TIME_NS / _NS_PER_US)
        us = np.where(known, us, 0.0)
        whole = np.floor(us)
        return whole.astype(np.int64) * _NS_PER_US + np.rint((us - whole) * _NS_PER_US).astype(
            np.int64
        ), known
    found = [_one_time(time) for time in times_us]
    return np.array([time or 0 for time in found], np.int64), np.array(
        [time is not None for time in found], np.bool_
    )


def _one_time(time: Any) -> int | None:
    try:
        ns = round(Decimal(time) * _NS_PER_US)
    except (ArithmeticError, TypeError, ValueError, OverflowError):
        return None
    return ns if abs(ns) < _MOST_TIME_NS else None


def _integers(values: list[Any]) -> NDArray[np.int64]:
    try:
        return np.array([NONE if value is None else value for value in values], np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.array([_integer(value) for value in values], np.int64)


def _integer(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return NONE
    return number if 0 <= number < 1 << 62 else NONE


# --------------------------------------------------------------------------------------------- columns -> Timeline


def _assemble(columns: _Columns, header: Header, rank: int, losses: tuple[Loss, ...]) -> Timeline:
    lane, kind, name = columns.column("lane"), columns.column("kind"), columns.column("name")
    start_ns, end_ns = columns.column("start"), columns.column("end")
    correlation, external = columns.column("correlation"), columns.column("external")
    first_ns = int(start_ns.min())
    base_ns = _integer(header.base_ns)
    origin_ns = first_ns + (base_ns if base_ns != NONE else 0)
    start_ns -= first_ns
    end_ns -= first_ns
    names = tuple(columns.names)
    is_cpu = np.array([on_cpu for on_cpu, _, _ in columns.lanes], np.bool_)[lane]
    parent = parents(lane, start_ns, end_ns, is_cpu)
    launched_ns, launch = _launches(kind, start_ns, correlation)
    parent = _of_device(kind, is_cpu, parent, launch, external)
    lanes = tuple(
        Lane(rank, not on_cpu, str(process), str(thread)) for on_cpu, process, thread in columns.lanes
    )
    spans = Spans(
        lane,
        kind,
        name,
        columns.column("shapes"),
        start_ns,
        end_ns,
        launched_ns,
        parent,
        columns.column("bytes"),
    )
    is_launch = kind == SpanKind.LAUNCH
    used = np.zeros(len(kind), np.bool_)
    used[launch[launch != NONE]] = True
    called = is_launch & np.array([_calls_for_work(text) for text in names], np.bool_)[name]
    collectives, groups, names = _collectives(columns.collectives, spans, names, header)
    timeline = Timeline(
        lanes=lanes,
        names=names,
        spans=spans,
        collectives=collectives,
        groups=groups,
        windows=(),
        origin_ns=origin_ns,
        facts=_facts(header),
        losses=losses,
        launches_without_kernel=(int((called & ~used).sum()), int(called.sum())),
    )
    if not any(each.is_device for each in lanes):
        timeline = _with_cpu_work(timeline)
    return replace(timeline, windows=_windows(timeline, rank))


def _calls_for_work(name: str) -> bool:
    return "LaunchKernel" in name or "launchKernel" in name.lower()


def _launches(
    kind: NDArray[Any], start_ns: NDArray[Any], correlation: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each device span (when the CPU called for it, the span of that call), by correlation."""
    launched_ns = np.full(len(kind), NONE, np.int64)
    launch = np.full(len(kind), NONE, np.int64)
    calls = np.flatnonzero((kind == SpanKind.LAUNCH) & (correlation > 0))
    works = np.flatnonzero((kind <= SpanKind.COPY) & (correlation > 0))
    if len(calls) and len(works):
        calls = calls[np.argsort(correlation[calls], kind="stable")]
        at = np.minimum(np.searchsorted(correlation[calls], correlation[works]), len(calls) - 1)
        known = correlation[calls[at]] == correlation[works]
        launch[works[known]] = calls[at[known]]
        launched_ns[works[known]] = start_ns[calls[at[known]]]
    return launched_ns, launch


def _of_device(
    kind: NDArray[Any],
    is_cpu: NDArray[np.bool_],
    parent: NDArray[np.int32],
    launch: NDArray[np.int64],
    external: NDArray[Any],
) -> NDArray[np.int32]:
    """Device spans belong to what stood around their launch; where that isn't known, to the CPU op of the same external id."""
    works = np.flatnonzero(~is_cpu)
    launched = works[launch[works] != NONE]
    parent[launched] = parent[launch[launched]]
    ops = np.flatnonzero((kind == SpanKind.OP) & (external > 0))
    orphans = works[(parent[works] == NONE) & (external[works] > 0)]
    if len(ops) and len(orphans):
        ops = ops[np.argsort(external[ops], kind="stable")]
        at = np.minimum(np.searchsorted(external[ops], external[orphans]), len(ops) - 1)
        known = external[ops[at]] == external[orphans]
        parent[orphans[known]] = ops[at[known]]
    return parent


def _facts(header: Header) -> tuple[tuple[str, str], ...]:
    facts = []
    devices = Counter(str(device.name)[:100] for device in header.devices if device.name is not None)
    if devices:
        facts.append(
            (
                "device",
                ", ".join(name if count == 1 else f"{count} x {name}" for name, count in devices.items()),
            )
        )
    if header.distributed is not None:
        if header.distributed.world_size is not None:
            facts.append(("world size", str(header.distributed.world_size)))
        if header.distributed.backend is not None:
            facts.append(("backend", str(header.distributed.backend)[:100]))
    return tuple(facts)


# --------------------------------------------------------------------------------------------- collectives


def _collectives(
    found: list[tuple[int, Any]], spans: Spans, names: tuple[str, ...], header: Header
) -> tuple[Collectives, tuple[Group, ...], tuple[str, ...]]:
    numbers = _Numbers({name: number for number, name in enumerate(names)})
    groups = _Numbers()
    configured = {
        str(group.pg_name): group.ranks
        for group in (header.distributed.pg_config if header.distributed is not None else ())
        if group.ranks is not None
    }
    _find_callers([span for span, _ in found], spans, names)
    origin_of = _Origins(spans, names)
    rows = []
    for span, args in found:
        kernel = names[spans.name[span]]
        said = "" if args is None or args.collective is None else str(args.collective)
        op = classify.collective_op(said) if said else classify.UNKNOWN
        if (
            op == classify.UNKNOWN
        ):  # who called says what was asked for: gloo carries out a reduce-scatter as an all-reduce
            op = _from_callers(span, spans, names) or classify.collective_op(kernel)
        group = _group(args, configured)
        elements_in, elements_out = (
            (NONE, NONE) if args is None else (_integer(args.elements_in), _integer(args.elements_out))
        )
        dtype = "" if args is None or args.dtype is None else str(args.dtype)
        if elements_in == NONE and args is not None and kernel.startswith("gloo:"):
            elements_in, dtype = _of_tensor(args)
            size = header.distributed.world_size if header.distributed is not None else None
            if (
                op == "all_gather" and size and len(configured) <= 1
            ):  # with more groups, how many ranks gather isn't said
                elements_out = elements_in * size
        elements = elements_out if op == "all_gather" else elements_in
        element_bytes = classify.DTYPE_BYTES.get(dtype.lower())
        full_bytes = elements * element_bytes if elements != NONE and element_bytes else NONE
        sequence = NONE if args is None else _integer(args.sequence)
        asked = origin_of(span)
        origin = NONE if asked is None else numbers[asked]
        rows.append(
            (
                span,
                numbers[op],
                numbers[dtype],
                origin,
                groups[group],
                sequence,
                max(elements_in, elements_out),
                full_bytes,
                NONE,
            )
        )
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    kinds = (np.int32, np.int32, np.int32, np.int32, np.int32, np.int64, np.int64, np.int64, np.int64)
    arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return Collectives(*arrays), tuple(groups), tuple(numbers)


def _find_callers(found: list[int], spans: Spans, names: tuple[str, ...]) -> None:
    """A backend's ranges in its worker threads begin in the order of the calls: gives each the c10d op that called for it as its parent."""
    ranges = [span for span in found if names[spans.name[span]].startswith("gloo:")]
    called = np.array(
        [name.startswith("c10d::") and not name.startswith("c10d::barrier") for name in names], np.bool_
    )
    calls = (
        np.flatnonzero(called[spans.name] & (spans.kind == SpanKind.OP)) if ranges else np.empty(0, np.int64)
    )
    if len(calls) != len(ranges):
        return
    calls = calls[np.argsort(spans.start_ns[calls], kind="stable")]
    ranges.sort(key=lambda span: int(spans.start_ns[span]))
    if all(
        spans.start_ns[call] <= spans.start_ns[span]
        for call, span in zip(calls.tolist(), ranges, strict=True)
    ):
        for call, span in zip(calls.tolist(), ranges, strict=True):
            spans.parent[span] = call


class _Origins:
    """Which module asked for a collective: by our own ranges, else by the innermost module's range, around its call."""

    def __init__(self, spans: Spans, names: tuple[str, ...]) -> None:
        self._spans = spans
        self._asked = [_OURS.match(name) or _MODULE.match(name) for name in names]

    def __call__(self, span: int) -> str | None:
        spans = self._spans
        at = int(spans.parent[span])
        for _ in range(64):
            if at == NONE:
                break
            asked = self._asked[spans.name[at]]
            if asked is not None:
                return str(asked[1])
            at = int(spans.parent[at])
        return None


def _from_callers(span: int, spans: Spans, names: tuple[str, ...]) -> str | None:
    """What the CPU ops and ranges around a collective's launch call it."""
    at, seen = int(spans.parent[span]), 0
    while at != NONE and seen < 64:
        name = names[spans.name[at]]
        if classify.issues_collective(name):
            op = classify.collective_op(name.partition("|")[0].rpartition(":")[2].rpartition(".")[2])
            if op != classify.UNKNOWN:
                return op
        at, seen = int(spans.parent[at]), seen + 1
    return None


def _group(args: Any, configured: dict[str, tuple[int, ...]]) -> Group:
    if args is None or args.group is None:
        return Group("", next(iter(configured.values())) if len(configured) == 1 else None)
    name = str(args.group)
    ranks = configured.get(name)
    if ranks is None and args.group_ranks is not UNSET:
        ranks = _listed_ranks(bytes(args.group_ranks))
    return Group(name, ranks)


def _listed_ranks(text: bytes) -> tuple[int, ...] | None:
    """Of "[0, 1, 2]", as a string or a list; None where the list was cut short."""
    try:
        value = msgspec.json.decode(text)
        if isinstance(value, str):
            value = msgspec.json.decode(value)
        return tuple(msgspec.convert(value, list[int]))
    except _ODD:
        return None


def _of_tensor(args: Any) -> tuple[int, str]:
    """(elements, dtype) of all tensors that a CPU range was given; (NONE, "") where it doesn't say."""
    try:
        dims = msgspec.json.decode(bytes(args.dims)) if args.dims is not UNSET else []
        types = msgspec.json.decode(bytes(args.types)) if args.types is not UNSET else []
        shapes = [msgspec.convert(each, list[int]) for each in dims]
        if not shapes or not types:
            return NONE, ""
        return sum(int(np.prod(shape, dtype=object)) for shape in shapes), str(types[0])
    except _ODD:
        return NONE, ""


# --------------------------------------------------------------------------------------------- work on a CPU


def _with_cpu_work(timeline: Timeline) -> Timeline:
    """Without devices, work is what the CPU ops do themselves: their spans without those inside them."""
    spans = timeline.spans
    names = timeline.names
    waiting = np.array([classify.waits(name) for name in names], np.bool_)
    is_op = spans.kind == SpanKind.OP
    workers = {int(spans.lane[span]) for span in timeline.collectives.span}
    in_collective = _inside(spans, timeline.collectives.span) if workers else np.zeros(len(spans), np.bool_)
    # what blocks in a collective stands inside an autograd function's op: our own ranges say so; else the time right after the call does
    ours = np.array([name.startswith("shardwise.") for name in names], np.bool_)[spans.name] & (
        spans.kind == SpanKind.RANGE
    )
    calls = np.flatnonzero(
        is_op & np.array([name.startswith("c10d::") for name in names], np.bool_)[spans.name]
    )
    after_calls = {(int(spans.lane[call]), int(spans.end_ns[call])) for call in calls.tolist()}
    keep = [
        (op, begin, end)
        for op, begin, end in own_segments(spans, np.flatnonzero(is_op | ours))
        if not (
            waiting[spans.name[op]]
            or in_collective[op]
            or ours[op]
            or (int(spans.lane[op]), begin) in after_calls
        )
    ]
    if not keep:
        return timeline
    ops, begins, ends = (np.array(column) for column in zip(*keep, strict=True))
    n = len(ops)
    added = Spans(
        lane=spans.lane[ops],
        kind=np.full(n, SpanKind.COMPUTE, np.int8),
        name=spans.name[ops],
        shapes=spans.shapes[ops],
        start_ns=begins.astype(np.int64),
        end_ns=ends.astype(np.int64),
        launched_ns=np.full(n, NONE, np.int64),
        parent=ops.astype(np.int32),
        n_bytes=np.full(n, NONE, np.int64),
    )
    joined = Spans(*(np.concatenate((getattr(spans, key), getattr(added, key))) for key in Spans.__slots__))
    return replace(timeline, spans=joined)


def _inside(spans: Spans, outer: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which spans lie inside one of `outer` on the same lane: what a backend's worker thread does is its collective's."""
    inside = np.zeros(len(spans), np.bool_)
    by_lane: dict[int, list[int]] = {}
    for span in outer.tolist():
        by_lane.setdefault(int(spans.lane[span]), []).append(span)
    for lane, found in by_lane.items():
        found.sort(key=lambda span: int(spans.start_ns[span]))
        starts = [int(spans.start_ns[span]) for span in found]
        for span in np.flatnonzero(spans.lane == lane).tolist():
            at = bisect_right(starts, int(spans.start_ns[span])) - 1
            inside[span] = at >= 0 and int(spans.start_ns[span]) < int(spans.end_ns[found[at]])
    return inside


# --------------------------------------------------------------------------------------------- steps


def _windows(timeline: Timeline, rank: int) -> tuple[Window, ...]:
    """Steps as the device sees them: from the first work launched in a step to the first launched in the next; the last one ends
    with its work. Without marks: all work, as one window. Without a device: the marks themselves."""
    spans = timeline.spans
    works = np.flatnonzero(spans.kind <= SpanKind.COPY)
    if not len(works):
        return ()
    whole = (Window(rank, None, int(spans.start_ns[works].min()), int(spans.end_ns[works].max())),)
    numbers = {
        index: int(found[1]) for index, name in enumerate(timeline.names) if (found := _STEP.search(name))
    }
    marks = np.flatnonzero(
        (spans.kind == SpanKind.RANGE) & np.isin(spans.name, np.array(list(numbers), np.int32))
    )
    marks = marks[np.argsort(spans.start_ns[marks], kind="stable")]
    if not len(marks):
        return whole
    if not any(lane.is_device for lane in timeline.lanes):
        marks = marks[spans.end_ns[marks] > spans.start_ns[marks]]
        return tuple(
            Window(rank, numbers[int(spans.name[mark])], int(spans.start_ns[mark]), int(spans.end_ns[mark]))
            for mark in marks
        )
    begins, ends, steps = [], [], []
    for mark in marks.tolist():
        launched = works[
            (spans.launched_ns[works] >= spans.start_ns[mark])
            & (spans.launched_ns[works] < spans.end_ns[mark])
        ]
        if len(launched):
            begins.append(int(spans.start_ns[launched].min()))
            ends.append(int(spans.end_ns[launched].max()))
            steps.append(numbers[int(spans.name[mark])])
    if not begins:
        return whole
    following = [*begins[1:], ends[-1]]
    return tuple(
        Window(rank, step, begin, end)
        for step, begin, end in zip(steps, begins, following, strict=True)
        if end > begin
    )
