"""The predicted step as a Timeline, the noun that a profile is read into: one micro-batch of the busiest
stage and the step's end, op by op.

    host thread            when the host issues each op and collective
    compute                the device's ops
    communication AXIS     collectives over one axis; the last rank arrives when a rank has waited for it
                           (predict/waiting.py), or when they start where nobody says how far apart ranks come

Of a pipeline, each stage has a Timeline of its own besides, with a span for each micro-batch's forward and
backward on each chunk, and for the bubble (pipeline_timelines).

Where gradients of replicas are summed beside the backward, it is the last micro-batch's, with its buckets.

What it leaves out: that compute slows down beside communication (Term.SLOWED) is a number without a place,
and so is what a ring's shifts take beside attention; the micro-batch begins with nothing in flight, as the
step's first does.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardwise.core.collective import is_off_mesh
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import any_layer, layer_index, moved_name
from shardwise.core.prediction_run import LaunchBound
from shardwise.core.program import Collective
from shardwise.core.timeline import NONE, Collectives, Group, Lane, SpanKind, Spans, Timeline, Window
from shardwise.predict.groups import groups_of
from shardwise.predict.layout import Layout
from shardwise.predict.pipeline import Pass, gaps, play
from shardwise.predict.streams import Run, beside_layers, run
from shardwise.predict.work import PHASES, Work, layers_of

MOST_PASSES = 20_000
BUBBLE = "bubble"
MOST_LISTED_RANKS = 4096
MOST_WAITS = 8

Columns = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class _Part:
    """A pass, or the step's end, placed: work with its run, beginning begin_s after the step."""

    work: Work
    run: Run
    begin_s: float


def timeline_of(layout: Layout) -> Timeline:
    """Forward, backward and the step's end of rank 0 of the stage that takes longest: one window."""
    return _Writer(layout).timeline()


def launch_bound(layout: Layout) -> tuple[LaunchBound, ...]:
    """Kinds of modules before whose work the device waits for the host, those that it waits for longest
    first."""
    longest = sorted(launch_waits(layout).items(), key=lambda pair: -pair[1])[:MOST_WAITS]
    return tuple(LaunchBound(module, phase, seconds) for (module, phase), seconds in longest)


def launch_waits(layout: Layout) -> dict[tuple[str, str], float]:
    """Seconds that the device's compute stream waits for the host before work and collectives of each kind of
    module in each phase, in a micro-batch and the step's end."""
    if layout.work.together:
        return {}
    prefix, _ = layers_of(layout.program)
    waits: dict[tuple[str, str], float] = defaultdict(float)
    for part in _parts(layout):
        own = np.flatnonzero(~beside_layers(part.work))  # what waits for its turn on the compute stream
        start, end, issued = part.run.start_s[own], part.run.end_s[own], part.run.issued_s[own]
        before = np.concatenate([[0.0], np.maximum.accumulate(end)[:-1]]) if len(own) else end
        gap = np.where(np.isclose(start, issued, rtol=0, atol=1e-12), start - before, 0.0)
        for row in np.flatnonzero(gap > 0):
            module = part.work.item(own[row]).module
            kind = any_layer(module) if layer_index(module, prefix) is not None else module
            waits[kind, PHASES[int(part.work.phase[own[row]])].value] += float(gap[row])
    return dict(waits)


def pipeline_timelines(layout: Layout) -> tuple[Timeline, ...]:
    """One per stage: a lane for each of its chunks, with a span for each pass where the schedule places it,
    and one for the bubble, with a span wherever the stage waits. Cut to the step's first micro-batches where
    there are more than MOST_PASSES. Empty without a pipeline."""
    setup, pipeline = layout.setup, layout.setup.pipeline()
    if setup.stages == 1:
        return ()
    rounds = max(1, MOST_PASSES // (2 * pipeline.parts * setup.stages))
    micro_batches = min(setup.micro_batches, rounds * setup.stages)
    passes = play(pipeline, layout.parts, micro_batches, layout.transfer_s)
    end_s = max(each.end_s for each in passes)
    left_out = setup.micro_batches - micro_batches
    facts = (("left out", f"{left_out} further micro-batches"),) if left_out else ()
    ranks = layout.mesh.world_size // setup.stages
    return tuple(
        _stage_timeline(
            stage,
            [each for each in passes if each.stage == stage],
            [(gap.start_s, gap.end_s) for gap in gaps(passes, stage, end_s)],
            pipeline.chunks,
            ranks,
            Window(stage * ranks, None, 0, round(end_s * 1e9)),
            facts,
        )
        for stage in range(setup.stages)
    )


def _stage_timeline(
    stage: int,
    passes: list[Pass],
    bubble: list[tuple[float, float]],
    chunks: int,
    ranks: int,
    window: Window,
    facts: tuple[tuple[str, str], ...],
) -> Timeline:
    """passes, bubble: the stage's own."""
    threads = [f"chunk {chunk}" for chunk in range(chunks)] if chunks > 1 else ["passes"]
    lanes = tuple(Lane(window.rank, True, f"stage {stage}", thread, ranks) for thread in (*threads, BUBBLE))
    names = [f"{'backward' if each.backward else 'forward'} {each.micro_batch}" for each in passes]
    known = {name: index for index, name in enumerate(dict.fromkeys((*names, BUBBLE)))}
    parts = sorted({each.part for each in passes})
    rows = [
        (parts.index(each.part), int(SpanKind.COMPUTE), known[name], each.start_s, each.end_s)
        for each, name in zip(passes, names, strict=True)
    ]
    # waiting is no work: no kind of it
    rows += [(chunks, int(SpanKind.RANGE), known[BUBBLE], *gap) for gap in bubble]
    rows.sort(key=lambda row: row[3])
    lane, kind, name, start, end = (np.array(column) for column in zip(*rows, strict=True))
    columns = {"lane": lane, "kind": kind, "name": name, "start_ns": _ns(start), "end_ns": _ns(end)}
    return Timeline(lanes, tuple(known), _spans(columns), _collectives([]), (), (window,), 0, facts)


def _parts(layout: Layout) -> list[_Part]:
    parts, at_s = [], 0.0
    for work in (layout.busiest.forward, layout.last, layout.end):
        if len(work):
            placed = run(work)
            parts.append(_Part(work, placed, at_s))
            at_s += placed.length_s
    return parts


class _Writer:
    """Collects the columns of a Timeline's spans, and the names in them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.parts = _parts(layout)
        self.prefix, _ = layers_of(layout.program)
        self.names: dict[str, int] = {}

    def name(self, text: str) -> int:
        return self.names.setdefault(text, len(self.names))

    def timeline(self) -> Timeline:
        axes, together = self.layout.work.axes, self.layout.work.together
        ranks = self.layout.mesh.world_size // self.layout.mesh.stages
        streams = () if together else ("compute", *(f"communication {axis}" for axis in axes))
        lanes = (
            Lane(0, False, "host", "issues", ranks),
            *(Lane(0, True, "device", s, ranks) for s in streams),
        )
        columns = [self._columns(part) for part in self.parts]
        issued, runs = (_joined(side) for side in zip(*columns, strict=True))
        count = len(issued["start_ns"])
        runs["parent"] = np.arange(count)
        spans = _spans(_joined([issued | {"parent": np.full(count, NONE)}, runs]))
        rows = self._collective_rows(spans, count)
        window = Window(0, None, 0, int(spans.end_ns.max(initial=0)))
        facts = (
            ("predicted", f"{self.layout.machine.name}: one micro-batch and the step's end"),
            ("waiting", "not modelled" if self.layout.punctual else "until the last rank has come"),
        )
        groups = tuple(map(self._group, axes))
        return Timeline(lanes, tuple(self.names), spans, _collectives(rows), groups, (window,), 0, facts)

    def _columns(self, part: _Part) -> tuple[Columns, Columns]:
        """Of the host, and of the device."""
        work, placed = part.work, part.run
        rows = range(len(work))
        start, end, issued, began = (
            _ns(column + part.begin_s)
            for column in (placed.start_s, placed.end_s, placed.issued_s, placed.issued_s - work.host_s)
        )
        told = [self._told(work, row) for row in rows]
        in_module = np.array(
            [self.name(f"{module}: {op}" if module else op) for module, op in told], np.int64
        )
        alone = np.array([self.name(op) for _, op in told], np.int64)
        shapes = np.array([self._shapes(work, row) for row in rows], np.int64)
        lane, nothing = np.zeros(len(work), np.int64), np.full(len(work), NONE)
        op, compute, collective = (int(kind) for kind in (SpanKind.OP, SpanKind.COMPUTE, SpanKind.COLLECTIVE))
        host = {
            "lane": lane,
            "kind": np.full(len(work), op),
            "name": in_module,
            "shapes": shapes,
            "start_ns": began,
            "end_ns": end if work.together else issued,
            "launched_ns": nothing,
        }
        device = {
            "lane": lane if work.together else 1 + work.axis.astype(np.int64),
            "kind": np.where(work.axis > 0, collective, compute),
            "name": alone,
            "shapes": shapes,
            "start_ns": began
            if work.together
            else start,  # a CPU issues while it works: all of it is the op's
            "end_ns": end,
            "launched_ns": began if work.together else issued,
        }
        return host, device

    def _told(self, work: Work, row: int) -> tuple[str, str]:
        """(module, op or collective) of a row."""
        item = work.item(row)
        index = layer_index(item.module, self.prefix)
        by = 0 if index is None else int(work.layer[row]) - index
        module = moved_name(item.module, self.prefix, by) if by else item.module
        return module, item.call.kind.value if isinstance(item, Collective) else item.name

    def _shapes(self, work: Work, row: int) -> int:
        item = work.item(row)
        return NONE if isinstance(item, Collective) else self.name(", ".join(map(str, item.inputs))[:200])

    def _collective_rows(self, spans: Spans, at: int) -> list[tuple[int, ...]]:
        """at: the first part's first span on the device."""
        rows: list[tuple[int, ...]] = []
        sequences: Counter[int] = Counter()
        for part in self.parts:
            for row in np.flatnonzero(part.work.axis > 0):
                item = part.work.item(int(row))
                assert isinstance(item, Collective)
                call, group, span = item.call, int(part.work.axis[row]) - 1, at + int(row)
                module, op = self._told(part.work, int(row))
                words = (self.name(op), self.name(call.dtype), self.name(module))
                elements = call.payload_bytes // DTYPE_BYTES.get(call.dtype, 1)
                arrival_ns = int(spans.start_ns[span]) + round(float(part.work.waits_s[row]) * 1e9)
                sizes = (elements, call.payload_bytes, min(arrival_ns, int(spans.end_ns[span])))
                rows.append((span, *words, group, sequences[group], *sizes))
                sequences[group] += 1
            at += len(part.work)
        return rows

    def _group(self, axis: str) -> Group:
        """Rank 0's group."""
        if is_off_mesh(axis):
            return Group(axis, None)
        group = groups_of(self.layout.program, self.layout.setup)[axis]
        return Group(axis, tuple(group.ranks()) if group.size <= MOST_LISTED_RANKS else None)


def _ns(seconds: ArrayLike) -> NDArray[np.int64]:
    return np.rint(np.asarray(seconds) * 1e9).astype(np.int64)


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _spans(columns: Mapping[str, NDArray[np.int64]]) -> Spans:
    """NONE in the columns that aren't given."""
    nothing = np.full(len(columns["start_ns"]), NONE)
    kinds = dict.fromkeys(("kind", "step_pass"), np.int8) | dict.fromkeys(
        ("lane", "name", "shapes", "parent", "module"), np.int32
    )
    made: dict[str, Any] = {
        name: columns.get(name, nothing).astype(kinds.get(name, np.int64)) for name in Spans.__slots__
    }
    return Spans(**made)


def _collectives(rows: list[tuple[int, ...]]) -> Collectives:
    columns = np.array(rows, np.int64).reshape(-1, 9).T
    return Collectives(*(column.astype(np.int32) for column in columns[:5]), *columns[5:])
