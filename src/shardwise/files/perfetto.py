"""Timelines of a run's ranks -> one gzip Chrome trace in which all of them stand on one clock: for
ui.perfetto.dev or chrome://tracing.

A process per rank, a thread per lane; on top of a rank, a lane of its own with the time before and after each
collective's last arrival.
"""

import gzip
from collections.abc import Iterator, Sequence
from io import BytesIO

import msgspec

from shardwise.core.timeline import NONE, SpanKind, Timeline

_AT_ONCE = 20_000
_WAITING_LANE = 0


def perfetto_trace(timelines: Sequence[Timeline]) -> bytes:
    """The file. Times are microseconds since the first rank's first event, with three decimals:
    nanoseconds."""
    packed = BytesIO()
    encoder = msgspec.json.Encoder()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=5, mtime=0) as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        written = 0
        held: list[bytes] = []
        for event in _events(timelines):
            held.append(encoder.encode(event))
            if len(held) == _AT_ONCE:
                file.write((b",\n" if written else b"") + b",\n".join(held))
                written += len(held)
                held.clear()
        if held:
            file.write((b",\n" if written else b"") + b",\n".join(held))
        file.write(b"\n]}\n")
    return packed.getvalue()


def _events(timelines: Sequence[Timeline]) -> Iterator[dict[str, object]]:
    first_ns = min(
        (int(timeline.spans.start_ns.min()) for timeline in timelines if len(timeline.spans)), default=0
    )
    for timeline in timelines:
        rank = timeline.ranks[0]
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        yield {
            "ph": "M",
            "name": "thread_name",
            "pid": rank,
            "tid": _WAITING_LANE,
            "args": {"name": "waiting and transfer"},
        }
        for number, lane in enumerate(timeline.lanes, 1):
            name = f"{'stream' if lane.is_device else 'thread'} {lane.thread}"
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": name}}
        yield from _spans(timeline, rank, first_ns)
        yield from _waiting(timeline, rank, first_ns)


def _spans(timeline: Timeline, rank: int, first_ns: int) -> Iterator[dict[str, object]]:
    spans = timeline.spans
    # on a CPU, what the ops do themselves stands in the ops already
    shown = (spans.kind != SpanKind.COMPUTE) | timeline.on_lanes([lane.is_device for lane in timeline.lanes])
    # work that takes no time by the model can't be seen, and no reader of traces takes it for work
    shown &= (spans.kind > SpanKind.COPY) | (spans.end_ns > spans.start_ns)
    columns = (
        spans.lane[shown],
        spans.kind[shown],
        spans.name[shown],
        spans.start_ns[shown],
        spans.end_ns[shown],
    )
    for lane, kind, name, start_ns, end_ns in zip(*(column.tolist() for column in columns), strict=True):
        yield {
            "ph": "X",
            "cat": SpanKind(kind).name.lower(),
            "name": timeline.names[name],
            "pid": rank,
            "tid": lane + 1,
            "ts": (start_ns - first_ns) / 1000,
            "dur": (end_ns - start_ns) / 1000,
        }


def _waiting(timeline: Timeline, rank: int, first_ns: int) -> Iterator[dict[str, object]]:
    spans, found = timeline.spans, timeline.collectives
    for row in range(len(found)):
        if found.arrival_ns[row] == NONE:
            continue
        span = int(found.span[row])
        start_ns, end_ns = int(spans.start_ns[span]), int(spans.end_ns[span])
        cut_ns = min(max(int(found.arrival_ns[row]), start_ns), end_ns)
        op = timeline.names[int(found.op[row])]
        for what, begin_ns, stop_ns in (("waiting", start_ns, cut_ns), ("transfer", cut_ns, end_ns)):
            if stop_ns > begin_ns:
                yield {
                    "ph": "X", "cat": what, "name": f"{what}: {op}", "pid": rank, "tid": _WAITING_LANE,
                    "ts": (begin_ns - first_ns) / 1000, "dur": (stop_ns - begin_ns) / 1000,
                }  # fmt: skip
