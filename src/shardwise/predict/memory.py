"""A rank's memory: the Program's peak, scaled to a stage of a pipeline and to other sizes of the data-parallel axes.

    reserved   active x RESERVED_OVER_ACTIVE: what the caching allocator rounds and can't reuse
    device     reserved and what the process holds beside tensors (context, libraries, communicators)

1F1B holds p - s micro-batches' activations on stage s, the interleaved schedule those of the first stage and (p-1)/(p v) more (Narayanan
et al. 2021, section 2.2; Korthikanti et al. 2022, section 4.2.3).
"""

from shardwise.core.machine import Machine
from shardwise.core.prediction import MemoryForecast, Setup
from shardwise.core.program import MemoryKind, Program, peak_by_kind

RESERVED_OVER_ACTIVE = 1.15
"""Median of 13 steps on an H100. Source: benchmarks/results/2026-11-26-h100-steps.json."""

STATES = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)


def forecast(program: Program, machine: Machine, setup: Setup, sizes: dict[str, int]) -> MemoryForecast:
    """Of the first stage, which holds most activations."""
    by_kind = {kind: float(n_bytes) for kind, n_bytes in peak_by_kind(program)}
    shards = sizes.get("fsdp", 1) / dict(program.axes).get("fsdp", 1)
    for kind in by_kind:
        if kind in STATES:
            by_kind[kind] /= setup.stages * shards
        elif kind is MemoryKind.ACTIVATION:
            in_flight = min(setup.micro_batches, setup.stages)
            more = 1 + (setup.stages - 1) / (setup.stages * setup.chunks) if setup.chunks > 1 else 1.0
            by_kind[kind] *= in_flight / setup.stages * more
    active = sum(by_kind.values())
    reserved = active * (RESERVED_OVER_ACTIVE if machine.device == "cuda" else 1.0)
    kinds = tuple((kind, by_kind[kind]) for kind in MemoryKind if by_kind.get(kind))
    return MemoryForecast(active, kinds, reserved, reserved + machine.context_bytes, machine.memory_bytes)
