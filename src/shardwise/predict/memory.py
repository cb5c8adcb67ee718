"""A rank's memory: the Program's peak, with its states in another precision, scaled to a stage of a pipeline
and to other sizes of the mesh.

    traced     the peak of everything, as tensors came and went
    otherwise  states live all the time, in the bytes per parameter below, reduced in the buffers that they
               live in; and the peak of everything else in forward and backward
    loss       where a compiler fuses it, without its storages in float32: logits, and their gradient
    reserved   active x RESERVED_OVER_ACTIVE: what the caching allocator rounds and can't reuse
    device     reserved and what the process holds beside tensors (context, libraries, communicators)

Bytes per parameter in half precision: master 2 + 4 + 12 (parameter, gradient, master weight and two moments;
Rajbhandari et al. 2020, section 3.1). 1F1B holds p micro-batches' activations on the first stage, the
interleaved schedule 1 + (p-1)/(p v) times as much (Narayanan et al. 2021, section 2.2; Korthikanti et al.
2022, section 4.2.3).
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.machine import Machine
from shardwise.core.mesh import SHARDS_AXIS
from shardwise.core.pipeline import most_in_flight
from shardwise.core.prediction import MemoryForecast, Precision, Setup
from shardwise.core.program import LOSS_MODULE, ONCE, MemoryChange, MemoryKind, Op, Phase, Program
from shardwise.predict.groups import further_shards, group_of, optimizer_shards

RESERVED_OVER_ACTIVE = 1.16
"""Median of 24 steps on an H100 and an H200 that hold more than 5 GiB (from 1.04 to 1.56), with the
allocator's defaults. Source: benchmarks/data/h100-steps.json and h200-steps.json (reserved_over_active in
benchmarks/measured_steps.py)."""

MADE_AGAIN = ("aten::silu",)
"""What a compiler makes again in the backward instead of keeping it: of the ops between a SwiGLU's matmuls.
Source: the compiled step in benchmarks/data/h100-steps.json, whose active memory is met so."""

STATES = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
KINDS = tuple(MemoryKind)
OF_MASTER = (1.0, 2.0, 6.0)  # of the traced bytes of the parameters: parameter, gradient, optimizer

ByKind = dict[MemoryKind, float]
Bytes = NDArray[np.float64]


def forecast(program: Program, machine: Machine, setup: Setup) -> MemoryForecast:
    """Of the first stage, which holds most activations."""
    scales, is_traced = _scales(program, setup), setup.precision is Precision.TRACED
    by_kind = peak_by_kind(program, setup, scales if is_traced else scales | dict.fromkeys(STATES, 0.0))
    if is_traced and setup.micro_batches > 1:
        by_kind = max(by_kind, _accumulating(program, setup, scales), key=lambda each: _scaled(each, scales))
    if not is_traced:
        for kind, share in zip(STATES, OF_MASTER, strict=True):
            by_kind[kind] = program.held(MemoryKind.PARAMETER) * share
    by_kind = {kind: n_bytes * scales.get(kind, 1.0) for kind, n_bytes in by_kind.items()}
    active = sum(by_kind.values())
    reserved = active * (RESERVED_OVER_ACTIVE if machine.device == "cuda" else 1.0)
    kinds = tuple((kind, by_kind[kind]) for kind in MemoryKind if by_kind.get(kind))
    return MemoryForecast(active, kinds, reserved, reserved + machine.context_bytes, machine.memory_bytes)


def _accumulating(program: Program, setup: Setup, scales: ByKind) -> ByKind:
    """At the peak of a micro-batch that isn't the first: gradients are there already, and what is added to
    them comes and goes. Where FSDP reduces once they are whole, and in the dtype that it reduces in."""
    kept = peak_by_kind(program, setup, scales | {MemoryKind.GRADIENT: 0.0})
    gradients = float(program.held(MemoryKind.GRADIENT))
    if program.settings.reduce_once:
        settings = program.settings
        widths = [DTYPE_BYTES[name] for name in (settings.reduced_dtype, settings.dtype)]
        gradients *= group_of(SHARDS_AXIS, program, setup).size * widths[0] / widths[1]
    return kept | {MemoryKind.GRADIENT: gradients}


def _scaled(by_kind: ByKind, scales: ByKind) -> float:
    return sum(n_bytes * scales.get(kind, 1.0) for kind, n_bytes in by_kind.items())


def _scales(program: Program, setup: Setup) -> ByKind:
    """What becomes of a traced byte of each kind in this setup; of those that aren't named, itself."""
    scales = dict.fromkeys(STATES, 1 / (setup.stages * further_shards(program, setup)))
    scales[MemoryKind.OPTIMIZER] /= optimizer_shards(program, setup)
    pipeline = setup.pipeline()
    in_flight = most_in_flight(pipeline.turns(0, setup.micro_batches))
    scales[MemoryKind.ACTIVATION] = in_flight / pipeline.parts
    return scales


def peak_by_kind(
    program: Program, setup: Setup, scales: Mapping[MemoryKind, float] = MappingProxyType({})
) -> ByKind:
    """What lives, as traced, at the moment at which all kinds hold most, each scaled (by 1 where it isn't
    named): with other shards the peak is elsewhere. A block that repeats is walked once: its peak is in its
    last repeat where it leaves more than it found, else in its first."""
    resident = dict(program.resident)
    live = np.array([float(resident.get(kind, 0)) for kind in KINDS])
    weights = np.array([scales.get(kind, 1.0) for kind in KINDS])
    best, best_live = float(live @ weights), live
    for n_bytes, kinds, times in _changes(program, setup):
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


def _changes(program: Program, setup: Setup) -> Iterable[tuple[Bytes, NDArray[np.int8], int]]:
    """Of each block the bytes and kind of its changes, in order, and how often it repeats."""
    fused = _fused_loss(program) if setup.compiled_loss else {}
    for place, block in enumerate(program.blocks):
        changes = [
            (fused.get((place, at), item.n_bytes), KINDS.index(item.kind))
            for at, item in enumerate(block.items)
            if isinstance(item, MemoryChange) and _counts(item, setup)
        ]
        n_bytes, kinds = np.array(changes, np.float64).reshape(-1, 2).T
        yield n_bytes, kinds.astype(np.int8), block.times


def _counts(change: MemoryChange, setup: Setup) -> bool:
    if setup.compiled and change.maker in MADE_AGAIN:
        return False
    return setup.precision is Precision.TRACED or change.phase not in ONCE


def _fused_loss(program: Program) -> dict[tuple[int, int], int]:
    """(block, item) -> bytes of the loss's storages where a compiler fuses it: the logits are kept as they
    are for the backward, which makes their gradient at once. Without the copies in float32, the probabilities
    and what lies between them, which no kernel writes out then.
    """
    logits_bytes = 0
    large: list[tuple[tuple[int, int], MemoryChange]] = []
    for place, block in enumerate(program.blocks):
        for at, item in enumerate(block.items):
            match item:
                case Op(phase=Phase.FORWARD):
                    logits_bytes = item.write_bytes
                case MemoryChange() if item.module == LOSS_MODULE and abs(item.n_bytes) >= logits_bytes:
                    large.append(((place, at), item))
                case _:
                    pass
    gradients = [change for _, change in large if change.phase is Phase.BACKWARD and change.n_bytes > 0]
    last = gradients[-1] if gradients else None
    # where the gradient takes the place of what was kept (the native loss in float32), both are counted there
    kept = logits_bytes if last is not None else 2 * logits_bytes
    fused = {}
    for where, change in large:
        gradient = logits_bytes if _is_of(change, last) else 0
        n_bytes = kept if change.kind is MemoryKind.ACTIVATION else gradient
        fused[where] = n_bytes if change.n_bytes > 0 else -n_bytes
    return fused


def _is_of(change: MemoryChange, made: MemoryChange | None) -> bool:
    """Whether this is `made`, or its end."""
    return made is not None and (abs(change.n_bytes), change.phase, change.maker) == (
        made.n_bytes,
        made.phase,
        made.maker,
    )
