"""A rank's memory: the Program's peak, with its states in another precision, of the fullest stage of a
pipeline, and scaled to other sizes of the mesh.

    traced     the peak of everything, as tensors came and went
    otherwise  states live all the time, in the bytes per parameter below, reduced in the buffers that they
               live in; and the peak of everything else in forward and backward
    workspace  what the library that multiplies keeps for each of its handles
    reserved   what the caching allocator takes for all of that, step after step (replay.py)
    device     reserved and what the process holds beside tensors (context, libraries, communicators)

Bytes per parameter in half precision: master 2 + 4 + 12 (parameter, gradient, master weight and two moments;
Rajbhandari et al. 2020, section 3.1). A stage of a pipeline has what it makes itself (stage_memory.py), and
activations of as many micro-batches as its schedule has in flight (core/pipeline.py); over several parts the
mean part stands for each.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.machine import Machine
from shardwise.core.mesh import SHARDS_AXIS
from shardwise.core.prediction import MemoryForecast, Precision, Setup
from shardwise.core.program import BACKWARDS, ONCE, MemoryChange, MemoryKind, Op, OpKind, Program
from shardwise.predict.changes import counts, fused_loss, scales_of
from shardwise.predict.groups import group_of
from shardwise.predict.replay import replayed
from shardwise.predict.scores import with_scores
from shardwise.predict.stage_memory import STATES, StagePart, stage_parts

KINDS = tuple(MemoryKind)
OF_MASTER = (1.0, 2.0, 6.0)  # of the traced bytes of the parameters: parameter, gradient, optimizer

ByKind = dict[MemoryKind, float]
Bytes = NDArray[np.float64]


def forecast(program: Program, machine: Machine, setup: Setup, *, replays: bool = True) -> MemoryForecast:
    """Of the fullest stage. replays: whether the allocator is simulated; else it is taken to reserve what is
    active, which it does at least."""
    program = with_scores(program, setup)
    parts = stage_parts(program, setup) or (None,)
    stages = [(part, of_stage(program, setup, part)) for part in parts]
    part, by_kind = max(stages, key=lambda each: sum(each[1].values()))
    by_kind |= _workspaces(program, machine)
    active = reserved = sum(by_kind.values())
    given_back = None
    if machine.device == "cuda" and replays:
        room = machine.memory_bytes - machine.context_bytes
        found = replayed(program, setup, part, workspace_bytes=machine.workspace_bytes)
        reserved = max(active, float(found.reserved_bytes))
        if active <= room < reserved:
            tight = replayed(
                program, setup, part, workspace_bytes=machine.workspace_bytes, capacity_bytes=room
            )
            given_back = None if tight.is_short else tight.given_back
    kinds = tuple((kind, by_kind[kind]) for kind in MemoryKind if by_kind.get(kind))
    device = reserved + machine.context_bytes
    stage = part.stage if part is not None else 0
    return MemoryForecast(active, kinds, reserved, device, machine.memory_bytes, stage, given_back)


def _workspaces(program: Program, machine: Machine) -> ByKind:
    """The forward's thread and the backward's each have a handle of the library, once it multiplies."""
    multiplies = {
        item.phase in BACKWARDS
        for block in program.blocks
        for item in block.items
        if isinstance(item, Op) and item.kind is OpKind.MATMUL and item.phase not in ONCE
    }
    return {MemoryKind.WORKSPACE: len(multiplies) * machine.workspace_bytes}


def of_stage(program: Program, setup: Setup, part: StagePart | None) -> ByKind:
    """At its peak. part: of a pipeline; None: of the whole step."""
    scales, is_traced = scales_of(program, setup), setup.precision is Precision.TRACED
    walked = scales if is_traced else scales | dict.fromkeys(STATES, 0.0)
    by_kind = peak_by_kind(program, setup, walked, part)
    if is_traced and setup.micro_batches > 1:
        accumulating = _accumulating(program, setup, scales, part)
        by_kind = max(by_kind, accumulating, key=lambda each: _scaled(each, scales))
    scaled = {kind: n_bytes * scales.get(kind, 1.0) for kind, n_bytes in by_kind.items()}
    return scaled if is_traced else scaled | kept(program, setup, part)


def kept(program: Program, setup: Setup, part: StagePart | None = None) -> ByKind:
    """Parameters, gradients and the optimizer's state of a rank between steps, in the setup's precision and
    shards."""
    scales, is_traced = scales_of(program, setup), setup.precision is Precision.TRACED
    found = {}
    for kind, of_parameters in zip(STATES, OF_MASTER, strict=True):
        source, times = (kind, 1.0) if is_traced else (MemoryKind.PARAMETER, of_parameters)
        found[kind] = program.held(source) * times * _share(part, source) * scales[kind]
    return found


def _share(part: StagePart | None, kind: MemoryKind) -> float:
    return part.shares.get(kind, 1.0) if part is not None else 1.0


def _accumulating(program: Program, setup: Setup, scales: ByKind, part: StagePart | None) -> ByKind:
    """At the peak of a micro-batch that isn't the first: gradients are there already, and what is added to
    them comes and goes. Where FSDP reduces once they are whole, and in the dtype that it reduces in."""
    peak = peak_by_kind(program, setup, scales, part, adds=True)
    gradients = program.held(MemoryKind.GRADIENT) * _share(part, MemoryKind.GRADIENT)
    if program.settings.reduce_once:
        settings = program.settings
        widths = [DTYPE_BYTES[name] for name in (settings.reduced_dtype, settings.dtype)]
        gradients *= group_of(SHARDS_AXIS, program, setup).size * widths[0] / widths[1]
    return peak | {MemoryKind.GRADIENT: gradients}


def _scaled(by_kind: ByKind, scales: ByKind) -> float:
    return sum(n_bytes * scales.get(kind, 1.0) for kind, n_bytes in by_kind.items())


def peak_by_kind(
    program: Program,
    setup: Setup,
    scales: Mapping[MemoryKind, float] = MappingProxyType({}),
    part: StagePart | None = None,
    *,
    adds: bool = False,
) -> ByKind:
    """What lives, as traced, at the moment at which all kinds hold most, each scaled (by 1 where it isn't
    named): with other shards the peak is elsewhere. A block that repeats is walked once: its peak is in its
    last repeat where it leaves more than it found, else in its first.

    part: only what this stage has, beside the activations of the micro-batches that are in flight. adds:
    gradients are there already (not counted here), and what is added to them comes and goes."""
    resident = {kind: held * _share(part, kind) for kind, held in program.resident}
    changes = list(_changes(program, setup, part, adds=adds))
    if part is not None:
        activations = _most(changes, MemoryKind.ACTIVATION)
        in_flight = part.then_in_flight if adds else part.in_flight
        for kind, more in (
            (MemoryKind.ACTIVATION, (in_flight - 1) * activations),
            (MemoryKind.GRADIENT, 0.0 if adds else part.tied_bytes),
            (MemoryKind.TEMPORARY, part.received_bytes),
        ):
            resident[kind] = resident.get(kind, 0.0) + more
    live = np.array([float(resident.get(kind, 0)) for kind in KINDS])
    weights = np.array([scales.get(kind, 1.0) for kind in KINDS])
    best, best_live = float(live @ weights), live
    for n_bytes, kinds, times in changes:
        grows = n_bytes * weights[kinds]
        net = _sums(n_bytes, kinds)
        before = live + net * (times - 1 if float(grows.sum()) > 0 else 0)
        running = np.cumsum(grows)
        if len(grows) and float(before @ weights) + running.max() > best:
            upto = int(running.argmax()) + 1
            best_live = before + _sums(n_bytes[:upto], kinds[:upto])
            best = float(best_live @ weights)
        live = live + net * times
    return {kind: float(held) for kind, held in zip(KINDS, best_live, strict=True) if held > 0}


def _sums(n_bytes: Bytes, kinds: NDArray[np.int8]) -> Bytes:
    sums: Bytes = np.bincount(kinds, weights=n_bytes, minlength=len(KINDS)).astype(np.float64)
    return sums


def _most(changes: Iterable[tuple[Bytes, NDArray[np.int8], int]], kind: MemoryKind) -> float:
    """The most that lives of one kind at once."""
    live = most = 0.0
    for n_bytes, kinds, times in changes:
        own = n_bytes[kinds == KINDS.index(kind)]
        net = float(own.sum())
        last = live + net * (times - 1 if net > 0 else 0)
        most = max(most, last + float(np.cumsum(own).max(initial=0.0)))
        live += net * times
    return most


def _changes(
    program: Program, setup: Setup, part: StagePart | None, *, adds: bool
) -> Iterator[tuple[Bytes, NDArray[np.int8], int]]:
    """The bytes and kind of each stretch's changes, in order, and how often it repeats."""
    fused = fused_loss(program) if setup.compiled_loss else {}
    is_behind = False
    for place, block in enumerate(program.blocks):
        chosen: list[int] = []
        changes: list[tuple[float, MemoryKind]] = []
        order = part.in_order(block) if part is not None else range(len(block.items))
        for at in order:
            item = block.items[at]
            is_behind |= item.phase in BACKWARDS
            if not isinstance(item, MemoryChange) or not counts(item, setup):
                continue
            if part is not None and ((is_behind and part.stays(item)) or (adds and part.is_there(item))):
                continue
            n_bytes, kind = float(fused.get((place, at), item.n_bytes)), item.kind
            if part is not None and kind is MemoryKind.ACTIVATION and not part.waits(item):
                kind = MemoryKind.TEMPORARY
            if adds and kind is MemoryKind.GRADIENT:
                changes += [(n_bytes, MemoryKind.TEMPORARY), (-n_bytes, MemoryKind.TEMPORARY)]
                chosen += [at, at]
            else:
                changes.append((n_bytes, kind))
                chosen.append(at)
        n_bytes_ = np.array([n_bytes for n_bytes, _ in changes], np.float64)
        kinds = np.array([KINDS.index(kind) for _, kind in changes], np.int8)
        if part is None:
            yield n_bytes_, kinds, block.times
            continue
        for shares, times in part.stretches(block):
            yield n_bytes_ * shares[chosen], kinds, times
