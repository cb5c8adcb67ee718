"""The predicted step as a Timeline, the noun that a profile is read into: one micro-batch of the busiest
stage and the step's end, op by op.

    host thread            when the host issues each op and collective
    compute                the device's ops
    communication AXIS     collectives over one axis; the last rank arrives when they start, since waiting
                           isn't modelled

Of a pipeline, each stage has a Timeline of its own besides, with a span for each micro-batch's forward and
backward (pipeline_timelines).

What it leaves out: that compute slows down beside communication (Term.SLOWED) and that gradients over dp may
be reduced beside the backward are numbers without a place; the micro-batch begins with nothing in flight, as
the step's first does.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardwise.core.machine import Machine
from shardwise.core.prediction import Setup
from shardwise.core.prediction_run import LaunchBound
from shardwise.core.program import Collective, Program, any_layer, layer_index, moved_name
from shardwise.core.timeline import NONE, Collectives, Group, Lane, SpanKind, Spans, Timeline, Window
from shardwise.predict.pipeline import layers_of_stages, one_f_one_b
from shardwise.predict.predict import passes_of, stages_of, step_end_of, transfer_s, without
from shardwise.predict.streams import Run, run
from shardwise.predict.work import PHASES, Work, further_shards, group_sizes, mesh_of, work_of

MOST_PASSES = 20_000
MOST_LISTED_RANKS = 4096
_WIDTHS = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class _Part:
    """A pass, or the step's end, placed: work with its run, beginning begin_s after the step."""

    work: Work
    run: Run
    begin_s: float


def timeline_of(program: Program, machine: Machine, setup: Setup) -> Timeline:
    """Forward, backward and the step's end of rank 0 of the stage that takes longest: one window."""
    parts = _parts(program, machine, setup)
    ranks = ranks_of_a_stage(program, setup)
    writer = _Writer(program, group_sizes(program, setup), ranks, together=machine.device == "cpu")
    return writer.timeline(parts, machine, setup)


def launch_bound(program: Program, machine: Machine, setup: Setup) -> tuple[LaunchBound, ...]:
    """Kinds of modules before whose work the device waits for the host, those that it waits for longest
    first."""
    if machine.device == "cpu":
        return ()
    prefix = program.layers[0] if program.layers is not None else None
    waits: dict[tuple[str, str], float] = defaultdict(float)
    for part in _parts(program, machine, setup):
        own = np.flatnonzero(part.work.axis == 0)
        start, end, issued = part.run.start_s[own], part.run.end_s[own], part.run.issued_s[own]
        before = np.concatenate([[0.0], np.maximum.accumulate(end)[:-1]]) if len(own) else end
        gap = np.where(np.isclose(start, issued, rtol=0, atol=1e-12), start - before, 0.0)
        for row in np.flatnonzero(gap > 0):
            item = part.work.items[int(part.work.template[own[row]])]
            module = any_layer(item.module) if layer_index(item.module, prefix) is not None else item.module
            waits[module, PHASES[int(part.work.phase[own[row]])].value] += float(gap[row])
    found = sorted(waits.items(), key=lambda pair: -pair[1])
    return tuple(LaunchBound(module, phase, seconds) for (module, phase), seconds in found[:8])


def pipeline_timelines(program: Program, machine: Machine, setup: Setup) -> tuple[Timeline, ...]:
    """One per stage: a span for each pass as 1F1B places it, and what the step's first passes are cut to
    where there are more than MOST_PASSES. Empty without a pipeline, and for the interleaved schedule, whose
    formula places nothing."""
    if setup.stages == 1 or setup.chunks > 1:
        return ()
    work = without(work_of(program, machine, setup), setup.without)
    stages = stages_of(work, program, setup, together=machine.device == "cpu")
    micro_batches = min(setup.micro_batches, max(1, MOST_PASSES // (2 * setup.stages)))
    passes = one_f_one_b(
        [stage.times for stage in stages], micro_batches, transfer_s(program, machine, setup)
    )
    ranks = ranks_of_a_stage(program, setup)
    end_ns = _ns(max(each.end_s for each in passes))
    facts: tuple[tuple[str, str], ...] = ()
    if micro_batches < setup.micro_batches:
        facts = (("left out", f"{setup.micro_batches - micro_batches} further micro-batches"),)
    names = tuple(
        f"{'backward' if back else 'forward'} {index}"
        for index in range(micro_batches)
        for back in (False, True)
    )
    found = []
    for stage in range(setup.stages):
        own = sorted((each for each in passes if each.stage == stage), key=lambda each: each.start_s)
        name = np.array([2 * each.micro_batch + each.backward for each in own], np.int32)
        start, end = (
            np.array([_ns(value) for value in column], np.int64)
            for column in zip(*((p.start_s, p.end_s) for p in own), strict=True)
        )
        spans = _spans(
            np.zeros(len(own), np.int32), np.full(len(own), SpanKind.COMPUTE, np.int8), name, start, end
        )
        lane = Lane(stage * ranks, True, f"stage {stage}", "passes", ranks)
        window = Window(stage * ranks, None, 0, end_ns)
        found.append(Timeline((lane,), names, spans, _no_collectives(), (), (window,), 0, facts))
    return tuple(found)


def ranks_of_a_stage(program: Program, setup: Setup) -> int:
    mesh = mesh_of(program, setup)
    return mesh.world_size // mesh.stages


def _parts(program: Program, machine: Machine, setup: Setup) -> list[_Part]:
    work = without(work_of(program, machine, setup), setup.without)
    together = machine.device == "cpu"
    stages = stages_of(work, program, setup, together=together)
    busiest = max(range(len(stages)), key=lambda index: stages[index].times.total_s)
    first, count = layers_of_stages(program.layers[1] if program.layers is not None else 0, setup.stages)[
        busiest
    ]
    _, forward, backward = passes_of(work, first, count, setup, busiest)
    parts, at_s = [], 0.0
    for part in (forward, backward, step_end_of(work, setup, further_shards(program, setup))):
        if len(part):
            placed = run(part, together=together)
            parts.append(_Part(part, placed, at_s))
            at_s += placed.length_s
    return parts


class _Writer:
    """Collects the columns of a Timeline's spans."""

    def __init__(self, program: Program, sizes: dict[str, int], ranks: int, *, together: bool) -> None:
        self.prefix = program.layers[0] if program.layers is not None else None
        self.sizes = sizes
        self.ranks = ranks
        self.together = together
        self.names: dict[str, int] = {}

    def name(self, text: str) -> int:
        return self.names.setdefault(text, len(self.names))

    def timeline(self, parts: list[_Part], machine: Machine, setup: Setup) -> Timeline:
        axes = parts[0].work.axes if parts else ()
        ranks = self.ranks
        host = Lane(0, False, "host", "issues", ranks)
        on_device = [
            Lane(0, True, "device", "compute", ranks),
            *(Lane(0, True, "device", f"communication {axis}", ranks) for axis in axes),
        ]
        lanes = (host, *([] if self.together else on_device))
        columns = [self._columns(part) for part in parts]
        host_columns, device_columns = zip(*columns, strict=True) if columns else ((), ())
        ops = [np.concatenate(column) for column in zip(*host_columns, strict=True)]
        runs = [np.concatenate(column) for column in zip(*device_columns, strict=True)]
        n_ops = len(ops[0])
        lane, kind, name, shapes, start, end, launched = (
            np.concatenate(pair) for pair in zip(ops, runs, strict=True)
        )
        spans = Spans(
            lane.astype(np.int32), kind.astype(np.int8), name.astype(np.int32), shapes.astype(np.int32), start, end, launched,
            np.concatenate([np.full(n_ops, NONE), np.arange(n_ops)]).astype(np.int32),
            np.full(len(lane), NONE, np.int64),
        )  # fmt: skip
        length_ns = int(end.max(initial=0))
        facts = (
            ("predicted", f"{machine.name}: one micro-batch and the step's end"),
            ("waiting", "not modelled"),
        )
        collectives = self._collectives(parts, spans, n_ops)
        return Timeline(
            lanes,
            tuple(self.names),
            spans,
            collectives,
            tuple(map(self._group, axes)),
            (Window(0, None, 0, length_ns),),
            0,
            facts,
        )

    def _columns(self, part: _Part) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        work, placed = part.work, part.run
        start, end, issued = (
            _all_ns(column + part.begin_s) for column in (placed.start_s, placed.end_s, placed.issued_s)
        )
        names = [self._name(work, row) for row in range(len(work))]
        op_names = np.array(
            [self.name(f"{module}: {op}" if module else op) for module, op in names], np.int64
        )
        run_names = np.array([self.name(op) for _, op in names], np.int64)
        shapes = np.array([self._shapes(work, row) for row in range(len(work))], np.int64)
        axis = _axis_of(work)
        kinds = np.where(axis > 0, int(SpanKind.COLLECTIVE), int(SpanKind.COMPUTE))
        nothing = np.full(len(work), NONE, np.int64)
        began = _all_ns(placed.issued_s + part.begin_s - work.host_s)
        if self.together:  # a CPU issues while it works: all of it is the op's
            start = began
        lane = np.zeros(len(work), np.int64)
        op_end = end if self.together else issued
        host = [lane, np.full(len(work), int(SpanKind.OP)), op_names, shapes, began, op_end, nothing]
        device = [
            lane if self.together else 1 + axis,
            kinds,
            run_names,
            shapes,
            start,
            end,
            began if self.together else issued,
        ]
        return host, device

    def _name(self, work: Work, row: int) -> tuple[str, str]:
        """(module, op or collective) of a row."""
        item = work.items[int(work.template[row])]
        index = layer_index(item.module, self.prefix)
        module = (
            item.module
            if index is None
            else moved_name(item.module, self.prefix, int(work.layer[row]) - index)
        )
        return module, item.call.kind.value if isinstance(item, Collective) else item.name

    def _shapes(self, work: Work, row: int) -> int:
        item = work.items[int(work.template[row])]
        return NONE if isinstance(item, Collective) else self.name(", ".join(map(str, item.inputs))[:200])

    def _collectives(self, parts: list[_Part], spans: Spans, n_ops: int) -> Collectives:
        rows: list[tuple[int, ...]] = []
        counts: dict[int, int] = defaultdict(int)
        at = n_ops
        for part in parts:
            axis = _axis_of(part.work)
            for row in np.flatnonzero(axis > 0):
                item = part.work.items[int(part.work.template[row])]
                assert isinstance(item, Collective)
                group, span = int(axis[row]) - 1, at + int(row)
                full, width = item.call.payload_bytes, _WIDTHS.get(item.call.dtype, 1)
                rows.append(
                    (
                        span, self.name(item.call.kind.value), self.name(item.call.dtype), self.name(self._name(part.work, int(row))[0]), group,
                        counts[group], full // width, full, int(spans.start_ns[span]),
                    )
                )  # fmt: skip
                counts[group] += 1
            at += len(part.work)
        columns = np.array(rows, np.int64).reshape(-1, 9).T
        return Collectives(*(column.astype(np.int32) for column in columns[:5]), *columns[5:])

    def _group(self, axis: str) -> Group:
        """Rank 0's group."""
        if axis not in self.sizes:
            return Group(axis, None)
        names = list(self.sizes)
        stride = prod(self.sizes[name] for name in names[names.index(axis) + 1 :])
        size = self.sizes[axis]
        return Group(axis, tuple(range(0, size * stride, stride)) if size <= MOST_LISTED_RANKS else None)


def _axis_of(work: Work) -> NDArray[np.int64]:
    """Per row: 0 for an op, else 1 + the index of the collective's axis. Work's own column says on which
    stream it runs."""
    by_item = [
        1 + work.axes.index(item.call.axis) if isinstance(item, Collective) else 0 for item in work.items
    ]
    return np.array(by_item, np.int64)[work.template]


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _all_ns(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(seconds * 1e9).astype(np.int64)


def _spans(
    lane: NDArray[np.int32],
    kind: NDArray[np.int8],
    name: NDArray[np.int32],
    start_ns: NDArray[np.int64],
    end_ns: NDArray[np.int64],
) -> Spans:
    count = len(lane)
    nothing, no_bytes = np.full(count, NONE, np.int32), np.full(count, NONE, np.int64)
    return Spans(lane, kind, name, nothing, start_ns, end_ns, no_bytes, nothing, no_bytes)


def _no_collectives() -> Collectives:
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.int64)
    return Collectives(none, none, none, none, none, nothing, nothing, nothing, nothing)
