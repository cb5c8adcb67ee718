"""Kernels that move memory, fitted: by op a curve over bytes, the median of its kind's ops for one that
wasn't timed; on a GPU look-ups by bytes and elements. No torch."""

from collections.abc import Sequence

import numpy as np

from shardwise.core.machine import DEFAULT, FRESH, KernelRate, Points, on_curve
from shardwise.core.program import OpKind
from shardwise.core.sample import Sample
from shardwise.predict.curves import Times, curve, median_curve, rounded
from shardwise.predict.draft import Draft, columns
from shardwise.predict.search import Vector, fitted

FEWEST_LOOK_UPS = 6
SHOWN = 0.5  # of the op's own time: less is noise
NOTHING_S = 1e-9
COPY_OPS = ("aten::clone", "aten::cat")
PLAIN_DTYPE = "float32"


def kernels(draft: Draft, samples: Sequence[Sample]) -> tuple[tuple[str, KernelRate], ...]:
    timed, kinds = _kernel_times(draft, samples)
    curves: dict[str, tuple[Points, Times]] = {name: (curve(times), times) for name, times in timed.items()}
    later = [(float(sample.write_bytes), sample.seconds) for sample in samples if sample.name == FRESH]
    fresh = _fresh(later, curves["aten::zeros_like"][0]) if later and "aten::zeros_like" in curves else None
    if fresh is not None:
        curves[FRESH] = fresh
    for kind in dict.fromkeys(kinds.values()):
        plain = [name for name in kinds if kinds[name] == kind and " " not in name]
        making = [name for name in plain if not name.endswith("_")] or plain
        if making:
            curves[kind] = _middle([curves[name] for name in making])
    common = [curves[kind] for kind in (OpKind.ELEMENTWISE, OpKind.COPY, OpKind.REDUCTION) if kind in curves]
    curves[DEFAULT] = _middle(common or list(curves.values()))
    rates = _look_ups(draft, samples) if draft.hardware.device == "cuda" else {}
    for name, (points, times) in curves.items():
        if name not in rates:
            draft.note_curve(f"kernels.{name}", name.removeprefix("aten::"), times, points, "bytes, s")
    by_curve = {name: KernelRate(points=points) for name, (points, _) in curves.items() if name not in rates}
    return (*rates.items(), *by_curve.items())


def _kernel_times(draft: Draft, samples: Sequence[Sample]) -> tuple[dict[str, Times], dict[str, str]]:
    """(bytes, seconds) of each op that moves memory, and its kind."""
    times: dict[str, list[tuple[float, float]]] = {}
    kinds: dict[str, str] = {}
    moving = set(OpKind) - {OpKind.MATMUL, OpKind.ATTENTION}
    for sample in samples:
        if sample.what not in moving or sample.name == FRESH:
            continue
        name = sample.name.partition(" ")[0]
        if draft.hardware.device == "cpu" and sample.dtype != PLAIN_DTYPE:
            name = f"{name} {sample.dtype}"
        times.setdefault(name, []).append((float(sample.n_bytes), sample.seconds))
        kinds[name] = sample.what
    return dict(times), kinds


def _middle(curves: Sequence[tuple[Points, Times]]) -> tuple[Points, Times]:
    """The median curve, and all that was timed."""
    return median_curve([points for points, _ in curves]), [time for _, times in curves for time in times]


def _look_ups(draft: Draft, samples: Sequence[Sample]) -> dict[str, KernelRate]:
    """Embeddings on a GPU, which elements may bound and not bytes: a start, and the slower of two rates."""
    rates: dict[str, KernelRate] = {}
    for op in ("aten::embedding", "aten::embedding_dense_backward"):
        mine = [sample for sample in samples if sample.name.partition(" ")[0] == op]
        if len(mine) >= FEWEST_LOOK_UPS:
            rates[op] = _look_up(draft, op, mine, _bandwidth_of(samples))
    return rates


def _look_up(draft: Draft, op: str, samples: Sequence[Sample], most_bytes_per_s: float) -> KernelRate:
    n_bytes, seconds = columns(samples, "n_bytes", "seconds")
    width = 0 if "backward" in op else 2
    elements = np.array([sample.shape[1] * sample.shape[width] for sample in samples], np.float64)

    def times(parameters: Vector) -> Vector:
        start_s, bytes_per_s, elements_per_s = parameters
        total: Vector = start_s + np.maximum(n_bytes / bytes_per_s, elements / elements_per_s)
        return total

    start = (seconds.min() / 2, (n_bytes / seconds).max(), (elements / seconds).max())
    (start_s, bytes_per_s, elements_per_s), error = fitted(times, seconds, start)
    bytes_per_s = min(bytes_per_s, most_bytes_per_s)
    values = {
        "start": (start_s * 1e6, "us"),
        "rate": (bytes_per_s / 1e9, "GB/s"),
        "elements": (elements_per_s / 1e9, "Gelement/s"),
    }
    draft.note_fit(f"kernels.{op}", op.removeprefix("aten::"), len(samples), error, values)
    return KernelRate(start_s, bytes_per_s, elements_per_s)


def _fresh(later: Times, at_once: Points) -> tuple[Points, Times] | None:
    """What zeros in memory handed out anew cost above those in memory that was given back just before, which
    is in every op's curve. None where no size shows it; nothing below the sizes that do."""
    more = sorted((size, seconds - on_curve(at_once, size)) for size, seconds in later)
    shown = [seconds > SHOWN * on_curve(at_once, size) for size, seconds in more]
    if not shown[-1]:
        return None
    first = max((at + 1 for at, is_shown in enumerate(shown) if not is_shown), default=0)
    kept = more[first:]
    below = more[first - 1][0] if first else kept[0][0] / 2
    return ((below, NOTHING_S), *curve(kept)), kept


def bandwidth(draft: Draft, samples: Sequence[Sample]) -> float:
    best = _fastest_copy(samples)
    what = f"measured: {best.name.removeprefix('aten::')} of {best.n_bytes >> 20} MiB, read and written"
    draft.note("memory.bandwidth", _bandwidth_of(samples) / 1e9, "GB/s per device", what)
    return _bandwidth_of(samples)


def _bandwidth_of(samples: Sequence[Sample]) -> float:
    best = _fastest_copy(samples)
    return rounded(best.n_bytes / best.seconds)


def _fastest_copy(samples: Sequence[Sample]) -> Sample:
    """Of the copies at least half as large as the largest, which no cache holds; of any op if none was
    copied."""
    moving = set(OpKind)
    moved = [each for each in samples if each.what in moving and each.n_bytes and each.name != FRESH]
    copies = [sample for sample in moved if sample.name.partition(" ")[0] in COPY_OPS] or moved
    largest = max(sample.n_bytes for sample in copies)
    large = [sample for sample in copies if sample.n_bytes >= largest / 2]
    return max(large, key=lambda sample: sample.n_bytes / sample.seconds)
