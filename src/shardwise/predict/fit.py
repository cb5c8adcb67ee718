"""fit(): Samples -> Machine. No torch.

    kernels      by op a curve over bytes, and look-ups on a GPU: fit_kernels.py
    matmul       one start, one extra_k, and a share of the peak for each tile, by the smallest median
                 |log(fitted / measured)|
    attention    rates forward and backward, the sequence at which half is reached, a start; the same way
    collectives  by kind and number of ranks a curve over what a rank sends
    spread       variances of when ranks come to a collective, a straight line over the work before it, by
                 the least squares of the logarithm; what the last rank comes after the mean one is the
                 expected maximum of so many deviations
    launch       a phase of small steps, without what its kernels take, over the ops of its traced Program

On a CPU, kernels and launches were timed in the thread's own seconds while all ranks ran; they are divided by
the share of a core that a rank got. `fresh memory` is what a tensor costs beside its op where the allocator
takes it anew from the system, long after it gave it back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from shardwise.core.collective import TIMED
from shardwise.core.machine import (
    UNKNOWN_LINK,
    AttentionRate,
    CollectiveRate,
    Launch,
    Link,
    Machine,
    MatmulRate,
    Spread,
    Tile,
)
from shardwise.core.order_statistics import expected_maximum
from shardwise.core.prediction import Setup
from shardwise.core.program import Op, OpKind, Phase, Program
from shardwise.core.sample import ARRIVAL, Sample
from shardwise.files.machine_file import machine_from_toml
from shardwise.files.machine_text import to_toml
from shardwise.predict.costs import op_cost
from shardwise.predict.curves import curve, rounded
from shardwise.predict.draft import ASKED, Draft, Hardware, Value, columns
from shardwise.predict.fit_kernels import bandwidth, kernels
from shardwise.predict.search import Vector, fitted

GPU_TILES = ((128, 256), (128, 128), (64, 128), (64, 64))
CPU_TILES = ((16, 16),)
PEAK_OVER_BEST = {"cuda": 1.1, "cpu": 1.02}
FEWEST_MATMULS = 3
MATMUL, LAUNCH = "matmul", "launch"


def fit(
    samples: Sequence[Sample],
    hardware: Hardware,
    programs: Mapping[str, Program] | None = None,
    base: Machine | None = None,
) -> Machine:
    """programs: of the steps whose launches were timed, by the first word of their samples' names. base: a
    machine whose links are taken where none were measured. Raises AssertionError where no matmul or no kernel
    is among the samples."""
    draft = Draft(hardware)
    scaled = [_scaled(sample, hardware) for sample in samples]
    rates = kernels(draft, scaled)
    matmuls = _matmuls(draft, scaled)
    assert matmuls, "no matmul to fit"
    machine = Machine(
        name=hardware.name,
        device=hardware.device,
        about=hardware.about,
        devices_per_node=hardware.devices_per_node,
        memory_bytes=float(hardware.memory_bytes),
        memory_bytes_per_s=bandwidth(draft, scaled),
        context_bytes=float(hardware.context_bytes),
        power_w=None,
        matmuls=matmuls,
        attentions=_attentions(draft, scaled),
        kernels=rates,
        launch=Launch(),
        within=_within(draft, scaled, base),
        between=base.between if base is not None else None,
        spread=_spread(draft, scaled, base),
    )
    held = "measured: what a rank holds before its first tensor"
    draft.note("memory.capacity", hardware.memory_bytes / 2**30, "GiB per device", ASKED)
    draft.note("memory.context", hardware.context_bytes / 2**20, "MiB per device", held)
    if base is not None:
        draft.constants += [each for each in base.constants if each.path.startswith("links.between")]
    launch = _launch(draft, scaled, machine, programs or {})
    machine = replace(machine, launch=launch, constants=tuple(draft.constants))
    return machine_from_toml(to_toml(machine), hardware.name)


def _scaled(sample: Sample, hardware: Hardware) -> Sample:
    """Kernels and launches in seconds of the wall, as a rank meets them."""
    if sample.what in (*TIMED, ARRIVAL) or hardware.share >= 1:
        return sample
    times = {name: getattr(sample, name) / hardware.share for name in ("seconds", "low_s", "high_s")}
    return replace(sample, **times)


def _matmuls(draft: Draft, samples: Sequence[Sample]) -> tuple[tuple[str, MatmulRate], ...]:
    by_dtype = _by_dtype(samples, MATMUL)
    return tuple(
        (dtype, _matmul(draft, dtype, mine))
        for dtype, mine in by_dtype.items()
        if len(mine) >= FEWEST_MATMULS
    )


def _by_dtype(samples: Sequence[Sample], what: str) -> dict[str, list[Sample]]:
    by_dtype: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.what == what:
            by_dtype.setdefault(sample.dtype, []).append(sample)
    return by_dtype


def _matmul(draft: Draft, dtype: str, samples: Sequence[Sample]) -> MatmulRate:
    device, units = draft.hardware.device, draft.hardware.units
    shapes, seconds = columns(samples, "shape", "seconds")
    peak = rounded(float((2 * shapes.prod(1) / seconds).max()) * PEAK_OVER_BEST[device])
    tiles = GPU_TILES if device == "cuda" else CPU_TILES
    batch, m, n, k = shapes.T
    waves = [
        np.ceil(batch * np.ceil(m / rows) * np.ceil(n / columns) / units) * 2 * rows * columns
        for rows, columns in tiles
    ]
    work = np.stack(waves)

    def times(parameters: Vector) -> Vector:
        start_s, extra_k, *shares = parameters
        each = work * (k + extra_k) * units / (peak * np.minimum(np.array(shares), 1.0)[:, None])
        total: Vector = each.min(0) + start_s
        return total

    # a share that has run into 1 doesn't find back: from several sides
    sides = product((0.5, 4.0, 60.0), (0.6, 0.8, 0.9))
    starts = [(float(seconds.min()) / 2, extra, *([share] * len(tiles))) for extra, share in sides]
    (start_s, extra_k, *shares), error = fitted(times, seconds, *starts)
    kept = tuple(Tile(*tile, min(1.0, share)) for tile, share in zip(tiles, shares, strict=True))
    path, what = f"matmul.{dtype}", f"{dtype} matmuls"
    fastest = f"measured: {PEAK_OVER_BEST[device]:g} x the fastest of {len(samples)} {what}"
    draft.note(f"{path}.peak", peak / 1e12, "TFLOP/s per device", fastest)
    draft.note(f"{path}.units", units, "1", ASKED if device == "cuda" else "one rank multiplies by itself")
    values: dict[str, tuple[Value, str]] = {
        "tiles": ([(tile.rows, tile.columns, tile.share) for tile in kept], "rows, columns, share of peak"),
        "start": (start_s * 1e6, "us"),
        "extra_k": (extra_k, "1"),
    }
    draft.note_fit(path, what, len(samples), error, values)
    return MatmulRate(peak, units, kept, start_s, extra_k)


def _attentions(draft: Draft, samples: Sequence[Sample]) -> tuple[tuple[str, AttentionRate], ...]:
    rates = []
    for dtype, mine in _by_dtype(samples, OpKind.ATTENTION).items():
        if draft.hardware.device == "cuda" and dtype == "float32":  # grouped heads have no fused kernel there
            mine = [sample for sample in mine if sample.shape[1] == sample.shape[2]]
        backward = sum("backward" in sample.name for sample in mine)
        if min(backward, len(mine) - backward) >= 1:
            rates.append((dtype, _attention(draft, dtype, mine)))
    return tuple(rates)


def _attention(draft: Draft, dtype: str, samples: Sequence[Sample]) -> AttentionRate:
    flops, seconds = columns(samples, "flops", "seconds")
    sequence = np.array([sample.shape[3] for sample in samples], np.float64)
    backward = np.array(["backward" in sample.name for sample in samples])

    def times(parameters: Vector) -> Vector:
        ahead, back, half, start_s = parameters
        total: Vector = flops / np.where(backward, back, ahead) * (1 + half / sequence) + start_s
        return total

    rates = flops / seconds
    start = (rates[~backward].max(), rates[backward].max(), 100.0, seconds.min() / 2)
    (ahead, back, half, start_s), error = fitted(times, seconds, start)
    values = {
        "forward": (ahead / 1e9, "GFLOP/s"),
        "backward": (back / 1e9, "GFLOP/s"),
        "half_sequence": (half, "tokens"),
        "start": (start_s * 1e6, "us"),
    }
    draft.note_fit(f"attention.{dtype}", f"{dtype} attention", len(samples), error, values)
    return AttentionRate(ahead, back, half, start_s)


def _within(draft: Draft, samples: Sequence[Sample], base: Machine | None) -> Link:
    mine = [sample for sample in samples if sample.what in TIMED]
    if not mine:
        if base is None:
            return UNKNOWN_LINK
        draft.constants += [
            replace(each, source=f"not measured, taken from {base.name}: {each.source}")
            for each in base.constants
            if each.path.startswith("links.within")
        ]
        return base.within
    rates = []
    for kind in TIMED:
        of_ranks: dict[int, list[tuple[float, float]]] = {}
        for sample in mine:
            if sample.what == kind:
                of_ranks.setdefault(sample.ranks, []).append((float(sample.write_bytes), sample.seconds))
        curves = {ranks: curve(of_ranks[ranks]) for ranks in sorted(of_ranks)}
        for at, (ranks, points) in enumerate(curves.items()):
            path, what = f"links.within.{kind}[{at}]", f"{kind} over {ranks} ranks"
            draft.note_curve(path, what, of_ranks[ranks], points, "bytes sent, s")
        if curves:
            rates.append(
                (kind, tuple(CollectiveRate(n, 0.0, math.inf, points) for n, points in curves.items()))
            )
    best = max(mine, key=lambda sample: sample.write_bytes / sample.seconds)
    bandwidth = rounded(best.write_bytes / best.seconds / 1e9)
    what = f"{best.what} of {best.write_bytes >> 10} KiB sent over {best.ranks} ranks"
    source = f"measured: the fastest collective, {what}"
    draft.note("links.within.bandwidth", bandwidth, "GB/s per device", source)
    return Link(bandwidth * 1e9, tuple(rates))


def _spread(draft: Draft, samples: Sequence[Sample], base: Machine | None) -> Spread | None:
    """By least squares of the logarithm; None where ranks' clocks weren't one."""
    mine = [sample for sample in samples if sample.what == ARRIVAL and sample.seconds > 0]
    if not mine:
        if base is None or base.spread is None:
            return None
        draft.constants += [
            replace(each, source=f"not measured, taken from {base.name}: {each.source}")
            for each in base.constants
            if each.path.startswith("spread")
        ]
        return base.spread
    deviations = np.array([sample.seconds / expected_maximum(sample.ranks) for sample in mine])
    work_s = np.array([sample.shape[0] / 1e9 for sample in mine])
    per_second, each = np.sqrt(_variance_line(work_s, deviations**2))
    fitted_s = np.sqrt(np.maximum(per_second**2 * work_s + each**2, 1e-24))
    error = float(np.median(np.abs(np.log(fitted_s / deviations))))
    ranks = ", ".join(str(number) for number in sorted({sample.ranks for sample in mine}))
    what = f"arrivals of {ranks} ranks after up to {1e3 * work_s.max():.0f} ms of work"
    values: dict[str, tuple[Value, str]] = {
        "work": (per_second * 1e6, "us"),
        "collective": (each * 1e6, "us"),
    }
    draft.note_fit("spread", what, len(mine), error, values)
    return Spread(float(per_second), float(each))


def _variance_line(work_s: Vector, variances: Vector) -> tuple[float, float]:
    """(a second's variance, a collective's), by least squares of the logarithm. Tried are lines that a
    collective's own variance lifts by that of so many seconds of work, and one that is flat."""
    lines = [(1.0, lift_s) for lift_s in (0.0, *np.geomspace(1e-9, 1e2, 1101))]
    found = []
    for slope, level in (*lines, (0.0, 1.0)):
        shape = np.maximum(slope * work_s + level, 1e-12)
        scale = float(np.exp(np.mean(np.log(variances / shape))))
        error = float(np.sum(np.log(scale * shape / variances) ** 2))
        found.append((error, scale * slope, scale * level))
    _, per_second, each = min(found)
    return per_second, each


def _launch(
    draft: Draft, samples: Sequence[Sample], machine: Machine, programs: Mapping[str, Program]
) -> Launch:
    known = {sample.name: sample for sample in samples if sample.what == LAUNCH}
    collective = known.get("collective")
    collective_s = collective.seconds if collective is not None else 0.0
    measured: dict[str, tuple[float, str]] = {}
    for name, prefix in (("native", ""), ("dtensor", "dtensor_")):
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            sample, program = known.get(f"{name} {phase}"), programs.get(name)
            if sample is not None and program is not None:
                seconds, ops = _issue_s(sample, program, phase, machine, collective_s)
                source = f"{phase} of small steps, {sample.repeats} of them over their {ops} recorded ops"
                if seconds > 0:  # else it can't be told from what the kernels take
                    measured[f"{prefix}{phase}"] = seconds, source
    if collective is not None:
        source = f"a differentiable all-gather of 32 bytes, {collective.repeats} batches"
        measured["collective"] = collective_s, source
    for name, (seconds, source) in measured.items():
        draft.note(f"launch.{name}", rounded(seconds) * 1e6, "us", f"measured: {source}")
    return Launch(**{f"{name}_s": rounded(seconds) for name, (seconds, _) in measured.items()})


def _issue_s(
    sample: Sample, program: Program, phase: Phase, machine: Machine, collective_s: float
) -> tuple[float, int]:
    """Seconds of the host per op, which may be below zero, and how many ops there were. Collectives are
    counted by themselves, and on a CPU what the kernels take is not the host's issuing."""
    ops: list[Op] = [op for op in program.ops() if op.phase is phase]
    kernels_s = sum(op_cost(op, machine, Setup()).device_s for op in ops) if machine.device == "cpu" else 0.0
    collectives = sum(each.phase is phase for each in program.collectives())
    return (sample.seconds - kernels_s - collectives * collective_s) / len(ops), len(ops)
