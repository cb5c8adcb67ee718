"""Work of a run without devices (gloo). There the collectives are the backend's own ranges
(`gloo:all_reduce`, from the start in a worker thread to the end), and compute is what the CPU ops of the
other threads do themselves, without the ops that only wait."""

from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from shardwise.core.timeline import NONE, SpanKind, Spans, Timeline
from shardwise.profiles import classify
from shardwise.profiles.nesting import own_segments


def with_cpu_work(timeline: Timeline) -> Timeline:
    """The Timeline with spans of what its CPU ops do themselves: their time without those inside them."""
    spans = timeline.spans
    ops, begins, ends = _own_work(timeline)
    n = len(ops)
    if not n:
        return timeline
    nothing = np.full(n, NONE, np.int64)
    kind = np.full(n, SpanKind.COMPUTE, np.int8)
    lane, name, shapes = spans.lane[ops], spans.name[ops], spans.shapes[ops]
    module, step_pass = spans.module[ops], spans.step_pass[ops]
    parent = ops.astype(np.int32)
    added = Spans(lane, kind, name, shapes, begins, ends, nothing, parent, nothing, module, step_pass)
    columns = [field.name for field in fields(Spans)]
    joined = [np.concatenate((getattr(spans, key), getattr(added, key))) for key in columns]
    return replace(timeline, spans=Spans(*joined))


def _own_work(timeline: Timeline) -> NDArray[np.int64]:
    """Three rows: op, start and end of what counts as work."""
    spans, names = timeline.spans, timeline.names

    def named(prefix: str, kind: SpanKind) -> NDArray[np.bool_]:
        starts = np.array([name.startswith(prefix) for name in names], np.bool_)
        chosen: NDArray[np.bool_] = starts[spans.name] & (spans.kind == kind)
        return chosen

    # what blocks in a collective stands inside an autograd function's op: our own ranges say so; else the
    # time right after the call does
    ours = named("shardwise.", SpanKind.RANGE)
    calls = np.flatnonzero(named("c10d::", SpanKind.OP))
    after_calls = set(zip(spans.lane[calls].tolist(), spans.end_ns[calls].tolist(), strict=True))
    waits = np.array([classify.waits(name) for name in names], np.bool_)[spans.name]
    is_no_work = ours | waits | _inside(spans, timeline.collectives.span)
    chosen = np.flatnonzero((spans.kind == SpanKind.OP) | ours)
    work = [
        (op, begin, end)
        for op, begin, end in own_segments(spans, chosen)
        if not is_no_work[op] and (int(spans.lane[op]), begin) not in after_calls
    ]
    return np.array(work, np.int64).reshape(-1, 3).T


def _inside(spans: Spans, outer: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which spans begin inside one of `outer` on its lane: a worker thread's work is its collective's."""
    inside = np.zeros(len(spans), np.bool_)
    outer = outer[np.argsort(spans.start_ns[outer], kind="stable")]
    for lane in np.unique(spans.lane[outer]):
        on_lane = outer[spans.lane[outer] == lane]
        within = np.flatnonzero(spans.lane == lane)
        at = np.searchsorted(spans.start_ns[on_lane], spans.start_ns[within], "right") - 1
        inside[within] = (at >= 0) & (spans.start_ns[within] < spans.end_ns[on_lane[at]])
    return inside
