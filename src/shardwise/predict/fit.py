"""fit(): Samples -> Machine. No torch.

    matmul       one start, one extra_k, and a share of the peak for each tile, by the smallest median |log(fitted / measured)|
    kernels      by op a curve over bytes; the median of its kind's ops for an op that wasn't timed
    look-ups     on a GPU a start and the slower of two rates, by bytes and by elements
    attention    rates forward and backward, the sequence at which half is reached, a start; the same way
    collectives  by kind and number of ranks a curve over what a rank sends
    launch       a phase of small steps, without what its kernels take, over the ops of its traced Program

On a CPU, kernels and launches were timed in the thread's own seconds while all ranks ran; they are divided by the share of a core that a rank
got. `fresh memory` is what a tensor costs beside its op where the allocator takes it anew from the system, long after it gave it back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from shardwise.core.collective import TIMED
from shardwise.core.machine import (
    DEFAULT,
    FRESH,
    UNKNOWN_LINK,
    AttentionRate,
    CollectiveRate,
    Constant,
    KernelRate,
    Launch,
    Link,
    Machine,
    MatmulRate,
    Points,
    Tile,
    on_curve,
)
from shardwise.core.prediction import Setup
from shardwise.core.program import Op, OpKind, Phase, Program
from shardwise.core.sample import Sample
from shardwise.files.machine_file import machine_from_toml
from shardwise.files.machine_text import constant, to_toml
from shardwise.predict.costs import op_cost
from shardwise.predict.curves import Times, curve, median_curve, residual, rounded
from shardwise.predict.search import Vector, log_errors, minimise, rough

GPU_TILES = ((128, 256), (128, 128), (64, 128), (64, 64))
CPU_TILES = ((16, 16),)
PEAK_OVER_BEST = {"cuda": 1.1, "cpu": 1.02}
FEWEST = {"matmul": 3, "attention": 2, "look-ups": 6}
SHOWN = 0.5  # of the op's own time: less is noise
NOTHING_S = 1e-9
COPY_OPS = ("aten::clone", "aten::cat")
MATMUL, LAUNCH = "matmul", "launch"
PLAIN_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What isn't measured but asked of the system. units: multiprocessors; 1 on a CPU. share: of a core that each rank got."""

    name: str
    device: str
    about: str
    devices_per_node: int
    memory_bytes: float
    context_bytes: float
    units: int = 1
    share: float = 1.0


@dataclass(slots=True)
class _Draft:
    """Constants as they are found."""

    hardware: Hardware
    constants: list[Constant] = field(default_factory=list)

    def note(
        self,
        path: str,
        value: float | Sequence[Sequence[float]],
        unit: str,
        source: str,
        fitted: str | None = None,
    ) -> None:
        self.constants.append(constant(path, value, unit, source, fitted))


def fit(
    samples: Sequence[Sample],
    hardware: Hardware,
    programs: Mapping[str, Program] | None = None,
    base: Machine | None = None,
) -> Machine:
    """programs: of the steps whose launches were timed, by the first word of their samples' names. base: a machine whose links are taken
    where none were measured. Raises AssertionError where there is no matmul or no kernel among the samples."""
    draft = _Draft(hardware)
    scaled = [_scaled(sample, hardware) for sample in samples]
    kernels = _kernels(draft, scaled)
    matmuls = _matmuls(draft, scaled)
    assert matmuls, "no matmul to fit"
    machine = Machine(
        name=hardware.name,
        device=hardware.device,
        about=hardware.about,
        devices_per_node=hardware.devices_per_node,
        memory_bytes=float(hardware.memory_bytes),
        memory_bytes_per_s=_bandwidth(draft, scaled),
        context_bytes=float(hardware.context_bytes),
        power_w=None,
        matmuls=matmuls,
        attentions=_attentions(draft, scaled),
        kernels=kernels,
        launch=Launch(0.0, 0.0, 0.0),
        within=_within(draft, scaled, base),
        between=base.between if base is not None else None,
    )
    draft.note(
        "memory.capacity", hardware.memory_bytes / 2**30, "GiB per device", "measured: what the system says"
    )
    draft.note(
        "memory.context",
        hardware.context_bytes / 2**20,
        "MiB per device",
        "measured: what a rank holds before its first tensor",
    )
    if base is not None:
        draft.constants += [each for each in base.constants if each.path.startswith("links.between")]
    machine = replace(
        machine, launch=_launch(draft, scaled, machine, programs or {}), constants=tuple(draft.constants)
    )
    return machine_from_toml(to_toml(machine), hardware.name)


def _scaled(sample: Sample, hardware: Hardware) -> Sample:
    """Kernels and launches in seconds of the wall, as a rank meets them."""
    if sample.what in TIMED or hardware.share >= 1:
        return sample
    return replace(
        sample, **{name: getattr(sample, name) / hardware.share for name in ("seconds", "low_s", "high_s")}
    )


def _told(what: str, count: int, error: float, hardware: Hardware) -> tuple[str, str]:
    """source and fitted."""
    source = f"measured: {what}, {count} samples, median residual {error:.1%}"
    if hardware.share < 0.995:
        source += f"; a rank got {hardware.share:.0%} of its core"
    return source, f"the {count} samples of {what}"


def _kernels(draft: _Draft, samples: Sequence[Sample]) -> tuple[tuple[str, KernelRate], ...]:
    by_name: dict[str, list[tuple[float, float]]] = {}
    kinds: dict[str, str] = {}
    for sample in samples:
        if (
            sample.what not in list(OpKind)
            or sample.what in (OpKind.MATMUL, OpKind.ATTENTION)
            or sample.name == FRESH
        ):
            continue
        name = sample.name.partition(" ")[0]
        if draft.hardware.device == "cpu" and sample.dtype != PLAIN_DTYPE:
            name = f"{name} {sample.dtype}"
        by_name.setdefault(name, []).append((float(sample.n_bytes), sample.seconds))
        kinds[name] = sample.what
    found: dict[str, tuple[Points, Times]] = {name: (curve(times), times) for name, times in by_name.items()}
    later = [(float(sample.write_bytes), sample.seconds) for sample in samples if sample.name == FRESH]
    fresh = _fresh(later, found["aten::zeros_like"][0]) if later and "aten::zeros_like" in found else None
    if fresh is not None:
        found[FRESH] = fresh
    for kind in dict.fromkeys(kinds.values()):
        plain = {name: found[name][0] for name in kinds if kinds[name] == kind and " " not in name}
        making = {name: points for name, points in plain.items() if not name.endswith("_")} or plain
        if making:
            found[kind] = (
                median_curve(list(making.values())),
                [time for name in making for time in found[name][1]],
            )
    common = [
        found[kind] for kind in (OpKind.ELEMENTWISE, OpKind.COPY, OpKind.REDUCTION) if kind in found
    ] or list(found.values())
    found[DEFAULT] = (
        median_curve([points for points, _ in common]),
        [time for _, times in common for time in times],
    )
    rates: dict[str, KernelRate] = {}
    if draft.hardware.device == "cuda":
        rates = _look_ups(draft, samples)
        for name in rates:
            found.pop(name, None)
    for name, (points, times) in found.items():
        source, fitted = _told(
            name.removeprefix("aten::"), len(times), residual(times, points), draft.hardware
        )
        draft.note(f"kernels.{name}.points", points, "bytes, s", source, fitted)
    return (*rates.items(), *((name, KernelRate(points=points)) for name, (points, _) in found.items()))


def _look_ups(draft: _Draft, samples: Sequence[Sample]) -> dict[str, KernelRate]:
    """Embeddings on a GPU, which elements may bound and not bytes: a start, and the slower of two rates."""
    rates: dict[str, KernelRate] = {}
    for op in ("aten::embedding", "aten::embedding_dense_backward"):
        mine = [sample for sample in samples if sample.name.partition(" ")[0] == op]
        if len(mine) < FEWEST["look-ups"]:
            continue
        n_bytes, seconds = (
            np.array([getattr(sample, name) for sample in mine], np.float64)
            for name in ("n_bytes", "seconds")
        )
        elements = np.array(
            [sample.shape[1] * sample.shape[0 if "backward" in op else 2] for sample in mine], np.float64
        )

        def times(parameters: Vector, n_bytes: Vector = n_bytes, elements: Vector = elements) -> Vector:
            start_s, bytes_per_s, elements_per_s = parameters
            slower: Vector = np.maximum(n_bytes / bytes_per_s, elements / elements_per_s)
            total: Vector = start_s + slower
            return total

        def cost(
            parameters: Vector, times: Callable[[Vector], Vector] = times, seconds: Vector = seconds
        ) -> float:
            return rough(log_errors(times(parameters), seconds))

        start = np.array([seconds.min() / 2, (n_bytes / seconds).max(), (elements / seconds).max()])
        best, _ = minimise(cost, start)
        error = float(np.median(log_errors(times(best), seconds)))
        start_s, bytes_per_s, elements_per_s = (rounded(value) for value in best)
        bytes_per_s = min(bytes_per_s, _bandwidth_of(samples))
        source, fitted = _told(op.removeprefix("aten::"), len(mine), error, draft.hardware)
        for name, value, unit in (
            ("start", start_s * 1e6, "us"), ("rate", bytes_per_s / 1e9, "GB/s"), ("elements", elements_per_s / 1e9, "Gelement/s"),
        ):  # fmt: skip
            draft.note(f"kernels.{op}.{name}", value, unit, source, fitted)
        rates[op] = KernelRate(start_s, bytes_per_s, elements_per_s)
    return rates


def _fresh(later: Times, at_once: Points) -> tuple[Points, Times] | None:
    """What zeros in memory handed out anew cost above those in memory that was given back just before, which is in every op's curve. None
    where no size shows it; nothing below the sizes that do."""
    more = sorted((size, seconds - on_curve(at_once, size)) for size, seconds in later)
    shown = [(size, seconds) for size, seconds in more if seconds > SHOWN * on_curve(at_once, size)]
    if not shown or shown[-1] != more[-1]:
        return None
    first = len(more) - next(
        (count for count, pair in enumerate(reversed(more)) if pair not in shown), len(more)
    )
    kept = more[first:]
    below = more[first - 1][0] if first else kept[0][0] / 2
    return ((below, NOTHING_S), *curve(kept)), kept


def _bandwidth(draft: _Draft, samples: Sequence[Sample]) -> float:
    best = _fastest_copy(samples)
    what = f"measured: {best.name.removeprefix('aten::')} of {best.n_bytes >> 20} MiB, read and written"
    draft.note("memory.bandwidth", _bandwidth_of(samples) / 1e9, "GB/s per device", what)
    return _bandwidth_of(samples)


def _bandwidth_of(samples: Sequence[Sample]) -> float:
    best = _fastest_copy(samples)
    return rounded(best.n_bytes / best.seconds)


def _fastest_copy(samples: Sequence[Sample]) -> Sample:
    """Of the copies at least half as large as the largest, which no cache holds; of any op where none was copied."""
    moved = [
        sample
        for sample in samples
        if sample.what in list(OpKind) and sample.n_bytes and sample.name != FRESH
    ]
    copies = [sample for sample in moved if sample.name.partition(" ")[0] in COPY_OPS] or moved
    largest = max(sample.n_bytes for sample in copies)
    return max(
        (sample for sample in copies if sample.n_bytes >= largest / 2),
        key=lambda sample: sample.n_bytes / sample.seconds,
    )


def _matmuls(draft: _Draft, samples: Sequence[Sample]) -> tuple[tuple[str, MatmulRate], ...]:
    found = []
    for dtype in dict.fromkeys(sample.dtype for sample in samples if sample.what == MATMUL):
        mine = [sample for sample in samples if sample.what == MATMUL and sample.dtype == dtype]
        if len(mine) >= FEWEST["matmul"]:
            found.append((dtype, _matmul(draft, dtype, mine)))
    return tuple(found)


def _matmul(draft: _Draft, dtype: str, samples: Sequence[Sample]) -> MatmulRate:
    shapes = np.array([sample.shape for sample in samples], np.float64)
    seconds = np.array([sample.seconds for sample in samples])
    flops = 2 * shapes.prod(1)
    device, units = draft.hardware.device, draft.hardware.units
    peak = rounded(float((flops / seconds).max()) * PEAK_OVER_BEST[device])
    tiles = GPU_TILES if device == "cuda" else CPU_TILES
    batch, m, n, k = shapes.T
    work = np.stack(
        [
            np.ceil(batch * np.ceil(m / rows) * np.ceil(n / columns) / units) * 2 * rows * columns
            for rows, columns in tiles
        ]
    )

    def times(parameters: Vector) -> Vector:
        start_s, extra_k, *shares = parameters
        each = work * (k + extra_k) * units / (peak * np.minimum(np.array(shares), 1.0)[:, None])
        return each.min(0) + start_s  # type: ignore[no-any-return]

    best: tuple[Vector, float] | None = None
    # a share that has run into 1 doesn't find back: from several sides
    for extra, share in product((0.5, 4.0, 60.0), (0.6, 0.8, 0.9)):
        start = np.array([float(seconds.min()) / 2, extra, *([share] * len(tiles))])
        tried = minimise(lambda parameters: rough(log_errors(times(parameters), seconds)), start)
        if best is None or tried[1] < best[1]:
            best = tried
    assert best is not None
    error = float(np.median(log_errors(times(best[0]), seconds)))
    start_s, extra_k, *shares = (rounded(value) for value in best[0])
    rows_ = tuple(
        Tile(rows, columns, min(1.0, share)) for (rows, columns), share in zip(tiles, shares, strict=True)
    )
    source, fitted = _told(f"{dtype} matmuls", len(samples), error, draft.hardware)
    path = f"matmul.{dtype}"
    draft.note(
        f"{path}.peak",
        peak / 1e12,
        "TFLOP/s per device",
        f"measured: {PEAK_OVER_BEST[device]:g} x the fastest of {len(samples)} {dtype} matmuls",
    )
    draft.note(
        f"{path}.units",
        units,
        "1",
        "measured: what the system says" if device == "cuda" else "one rank multiplies by itself",
    )
    draft.note(
        f"{path}.tiles",
        [(tile.rows, tile.columns, tile.share) for tile in rows_],
        "rows, columns, share of peak",
        source,
        fitted,
    )
    draft.note(f"{path}.start", start_s * 1e6, "us", source, fitted)
    draft.note(f"{path}.extra_k", extra_k, "1", source, fitted)
    return MatmulRate(peak, units, rows_, start_s, extra_k)


def _attentions(draft: _Draft, samples: Sequence[Sample]) -> tuple[tuple[str, AttentionRate], ...]:
    found = []
    for dtype in dict.fromkeys(sample.dtype for sample in samples if sample.what == OpKind.ATTENTION):
        mine = [sample for sample in samples if sample.what == OpKind.ATTENTION and sample.dtype == dtype]
        if draft.hardware.device == "cuda" and dtype == "float32":  # grouped heads have no fused kernel there
            mine = [sample for sample in mine if sample.shape[1] == sample.shape[2]]
        backward = [sample for sample in mine if "backward" in sample.name]
        if min(len(backward), len(mine) - len(backward)) >= FEWEST["attention"] // 2:
            found.append((dtype, _attention(draft, dtype, mine)))
    return tuple(found)


def _attention(draft: _Draft, dtype: str, samples: Sequence[Sample]) -> AttentionRate:
    flops, seconds = (
        np.array([getattr(sample, name) for sample in samples], np.float64) for name in ("flops", "seconds")
    )
    sequence = np.array([sample.shape[3] for sample in samples], np.float64)
    backward = np.array(["backward" in sample.name for sample in samples])

    def times(parameters: Vector) -> Vector:
        ahead, back, half, start_s = parameters
        return flops / np.where(backward, back, ahead) * (1 + half / sequence) + start_s  # type: ignore[no-any-return]

    start = np.array(
        [(flops / seconds)[~backward].max(), (flops / seconds)[backward].max(), 100.0, seconds.min() / 2]
    )
    best, _ = minimise(lambda parameters: rough(log_errors(times(parameters), seconds)), start)
    error = float(np.median(log_errors(times(best), seconds)))
    forward, back, half, start_s = (rounded(value) for value in best)
    source, fitted = _told(f"{dtype} attention", len(samples), error, draft.hardware)
    for name, value, unit in (
        ("forward", forward / 1e9, "GFLOP/s"), ("backward", back / 1e9, "GFLOP/s"), ("half_sequence", half, "tokens"), ("start", start_s * 1e6, "us"),
    ):  # fmt: skip
        draft.note(f"attention.{dtype}.{name}", value, unit, source, fitted)
    return AttentionRate(forward, back, half, start_s)


def _within(draft: _Draft, samples: Sequence[Sample], base: Machine | None) -> Link:
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
        found: list[CollectiveRate] = []
        for ranks in sorted({sample.ranks for sample in mine if sample.what == kind}):
            times = [
                (float(sample.write_bytes), sample.seconds)
                for sample in mine
                if sample.what == kind and sample.ranks == ranks
            ]
            points = curve(times)
            source, fitted = _told(
                f"{kind} over {ranks} ranks",
                len(times),
                residual(times, points),
                replace(draft.hardware, share=1.0),
            )
            draft.note(f"links.within.{kind}[{len(found)}].points", points, "bytes sent, s", source, fitted)
            found.append(CollectiveRate(ranks, 0.0, math.inf, points))
        if found:
            rates.append((kind, tuple(found)))
    best = max(mine, key=lambda sample: sample.write_bytes / sample.seconds)
    bandwidth = rounded(best.write_bytes / best.seconds / 1e9)
    what = f"measured: the fastest collective, {best.what} of {best.write_bytes >> 10} KiB sent over {best.ranks} ranks"
    draft.note("links.within.bandwidth", bandwidth, "GB/s per device", what)
    return Link(bandwidth * 1e9, tuple(rates))


def _launch(
    draft: _Draft, samples: Sequence[Sample], machine: Machine, programs: Mapping[str, Program]
) -> Launch:
    known = {sample.name: sample for sample in samples if sample.what == LAUNCH}
    collective_s = known["collective"].seconds if "collective" in known else 0.0
    values: dict[str, float | None] = {
        "forward": 0.0,
        "backward": 0.0,
        "collective": 0.0,
        "dtensor_forward": None,
        "dtensor_backward": None,
    }
    for name, prefix in (("native", ""), ("dtensor", "dtensor_")):
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            sample, program = known.get(f"{name} {phase}"), programs.get(name)
            if sample is None or program is None:
                continue
            seconds, ops = _issue_s(sample, program, phase, machine, collective_s)
            values[f"{prefix}{phase}"] = rounded(seconds)
            what = f"measured: {phase} of small steps, {sample.repeats} of them over their {ops} recorded ops"
            draft.note(f"launch.{prefix}{phase}", rounded(seconds) * 1e6, "us", what)
    if "collective" in known:
        sample = known["collective"]
        values["collective"] = rounded(sample.seconds)
        draft.note(
            "launch.collective",
            rounded(sample.seconds) * 1e6,
            "us",
            f"measured: a differentiable all-gather of 32 bytes, {sample.repeats} batches",
        )
    for name in ("forward", "backward", "collective"):
        if not any(each.path == f"launch.{name}" for each in draft.constants):
            draft.note(f"launch.{name}", 0.0, "us", "not measured: counted as nothing")
    names = ("forward", "backward", "collective", "dtensor_forward", "dtensor_backward")
    return Launch(*(values[name] for name in names))  # type: ignore[arg-type]


def _issue_s(
    sample: Sample, program: Program, phase: Phase, machine: Machine, collective_s: float
) -> tuple[float, int]:
    """Seconds of the host per op, and how many ops there were. Collectives are counted by themselves, and on a CPU what the kernels take is not the
    host's issuing."""
    ops: list[Op] = [op for op in program.ops() if op.phase is phase]
    kernels_s = sum(op_cost(op, machine, Setup()).device_s for op in ops) if machine.device == "cpu" else 0.0
    collectives = sum(each.phase is phase for each in program.collectives())
    return max(0.0, sample.seconds - kernels_s - collectives * collective_s) / len(ops), len(ops)
