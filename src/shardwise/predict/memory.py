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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from shardwise.core.machine import Machine
from shardwise.core.prediction import MemoryForecast, Precision, Setup
from shardwise.core.program import LOSS_MODULE, MemoryChange, MemoryKind, Op, Phase, Program
from shardwise.predict.work import further_shards

RESERVED_OVER_ACTIVE = 1.16
"""Median of 24 steps on an H100 and an H200 that hold more than 5 GiB (from 1.04 to 1.56), with the
allocator's defaults. Source: benchmarks/data/h100-steps.json and h200-steps.json (reserved_over_active in
benchmarks/measured_steps.py)."""

MADE_AGAIN = ("aten::silu",)
"""What a compiler makes again in the backward instead of keeping it: of the ops between a SwiGLU's matmuls.
Source: the compiled step in benchmarks/data/h100-steps.json, whose active memory is met so."""

_ONCE = (Phase.REDUCE, Phase.CLIP, Phase.OPTIMIZER)
STATES = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
OF_MASTER = (1.0, 2.0, 6.0)  # of the traced bytes of the parameters: parameter, gradient, optimizer

ByKind = dict[MemoryKind, float]


def forecast(program: Program, machine: Machine, setup: Setup) -> MemoryForecast:
    """Of the first stage, which holds most activations."""
    scales = _scales(program, setup)
    if setup.precision is Precision.TRACED:
        by_kind = peak_by_kind(program, lambda _: True, setup, scales)
    else:
        by_kind = peak_by_kind(program, lambda kind: kind not in STATES, setup, scales)
        for kind, share in zip(STATES, OF_MASTER, strict=True):
            by_kind[kind] = program.held(MemoryKind.PARAMETER) * share
    by_kind = {kind: n_bytes * scales.get(kind, 1.0) for kind, n_bytes in by_kind.items()}
    active = sum(by_kind.values())
    reserved = active * (RESERVED_OVER_ACTIVE if machine.device == "cuda" else 1.0)
    kinds = tuple((kind, by_kind[kind]) for kind in MemoryKind if by_kind.get(kind))
    return MemoryForecast(active, kinds, reserved, reserved + machine.context_bytes, machine.memory_bytes)


def _scales(program: Program, setup: Setup) -> ByKind:
    """What becomes of a traced byte of each kind in this setup."""
    scales = dict.fromkeys(STATES, 1 / (setup.stages * further_shards(program, setup)))
    scales[MemoryKind.OPTIMIZER] /= setup.optimizer_shards
    in_flight = min(setup.micro_batches, setup.stages)
    more = 1 + (setup.stages - 1) / (setup.stages * setup.chunks) if setup.chunks > 1 else 1.0
    scales[MemoryKind.ACTIVATION] = in_flight / setup.stages * more
    return scales


@dataclass(frozen=True, slots=True)
class _Row:
    """One block's changes: bytes and kind of each, in order."""

    n_bytes: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    kinds: "np.ndarray[tuple[int], np.dtype[np.int8]]"
    times: int


def peak_by_kind(
    program: Program,
    counts: Callable[[MemoryKind], bool],
    setup: Setup,
    scales: Mapping[MemoryKind, float] = MappingProxyType({}),
) -> ByKind:
    """What lives, as traced, at the moment at which the kinds that count hold most, each scaled: with other
    shards the peak is elsewhere. A block that repeats is walked once: its peak is in its last repeat where it
    leaves more than it found, else in its first."""
    all_kinds = tuple(MemoryKind)
    live = np.zeros(len(all_kinds))
    for kind, n_bytes in program.resident:
        live[all_kinds.index(kind)] += n_bytes
    weights = np.array([scales.get(kind, 1.0) if counts(kind) else 0.0 for kind in all_kinds])
    best, best_live = float(live @ weights), live.copy()
    for row in _rows(program, setup):
        grows = row.n_bytes * weights[row.kinds]
        total = float(grows.sum())
        net = np.bincount(row.kinds, weights=row.n_bytes, minlength=len(all_kinds))
        before = live + net * (row.times - 1 if total > 0 else 0)
        if len(grows):
            running = np.cumsum(grows)
            top = int(running.argmax())
            if float(before @ weights) + running[top] > best:
                upto = np.bincount(
                    row.kinds[: top + 1], weights=row.n_bytes[: top + 1], minlength=len(all_kinds)
                )
                best_live = before + upto
                best = float(best_live @ weights)
        live = live + net * row.times
    return {kind: float(best_live[index]) for index, kind in enumerate(all_kinds) if best_live[index] > 0}


def _rows(program: Program, setup: Setup) -> Iterable[_Row]:
    index = {kind: number for number, kind in enumerate(MemoryKind)}
    fused = _fused_loss(program) if setup.compiled_loss else {}
    for place, block in enumerate(program.blocks):
        pairs = [
            (fused.get((place, at), item.n_bytes), item)
            for at, item in enumerate(block.items)
            if isinstance(item, MemoryChange)
        ]
        if setup.compiled:
            pairs = [(n_bytes, change) for n_bytes, change in pairs if change.maker not in MADE_AGAIN]
        if setup.precision is not Precision.TRACED:
            pairs = [(n_bytes, change) for n_bytes, change in pairs if change.phase not in _ONCE]
        changes = [change for _, change in pairs]
        n_bytes = np.array([n_bytes for n_bytes, _ in pairs], np.float64)
        yield _Row(n_bytes, np.array([index[change.kind] for change in changes], np.int8), block.times)


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
    found = {}
    for where, change in large:
        n_bytes = (
            kept if change.kind is MemoryKind.ACTIVATION else logits_bytes if _is_of(change, last) else 0
        )
        found[where] = n_bytes if change.n_bytes > 0 else -n_bytes
    return found


def _is_of(change: MemoryChange, made: MemoryChange | None) -> bool:
    """Whether this is `made`, or its end."""
    return made is not None and (abs(change.n_bytes), change.phase, change.maker) == (
        made.n_bytes,
        made.phase,
        made.maker,
    )
