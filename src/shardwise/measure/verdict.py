"""From measurements to an answer in words: each plan against the first, the noise, and what the numbers do not say."""

from collections.abc import Sequence
from statistics import median

from shardwise.core.collective import CollectiveKind
from shardwise.core.measurement import Measurement, Ratio, Standing
from shardwise.measure.statistics import CONFIDENCE, paired_ratio


def standings(measurements: Sequence[Measurement], tokens: int | None) -> tuple[Standing, ...]:
    """Every plan's median time and ratio to the first. tokens: of one step over all ranks; None where a module alone was measured."""
    first = measurements[0]
    return tuple(
        Standing(
            label=m.label,
            step_s=median(m.step_s),
            tokens_per_s=None if tokens is None else tokens / median(m.step_s),
            ratio=None if m is first else paired_ratio(m.step_s, first.step_s),
            module_forward_s=median(m.module_times.forward_s) if m.module_times else None,
            module_backward_s=median(m.module_times.backward_s) if m.module_times else None,
            module_ratio=None if m is first else _module_ratio(m, first),
        )
        for m in measurements
    )


def _module_ratio(m: Measurement, first: Measurement) -> Ratio | None:
    if m.module_times is None or first.module_times is None:
        return None
    return paired_ratio(m.module_times.total_s, first.module_times.total_s)


def noise_of(measurements: Sequence[Measurement], found: Sequence[Standing]) -> Ratio | None:
    """The ratio of the first plan's second run to its first."""
    return next((s.ratio for m, s in zip(measurements, found, strict=True) if m.repeats is not None), None)


def verdict(
    measurements: Sequence[Measurement], found: Sequence[Standing], *, what: str, backend: str
) -> tuple[str, ...]:
    """One sentence per plan against the first, the noise floor, and on gloo why the ranking need not hold elsewhere."""
    noise = noise_of(measurements, found)
    first = found[0].label
    lines = []
    for measurement, standing in zip(measurements, found, strict=True):
        if standing.ratio is not None and measurement.repeats is None:
            lines.append(_against(standing.label, first, standing.ratio, noise, what))
    lines += _module_lines(measurements, found)
    if noise is not None:
        shown = f"{first} against itself: {_interval(noise)}"
        if noise.holds_one or noise.confidence < CONFIDENCE:
            lines.append(f"Noise floor: {shown}.")
        else:
            lines.append(
                f"Noise floor: {shown}. It leaves out 1, so this machine was not quiet: differences of this size mean nothing here."
            )
    if backend == "gloo":
        lines.append(
            "Measured on gloo over loopback: the ranking need not hold on NCCL. There the wire is faster by far, look-ups and copies run on "
            "the GPU, DTensor uses a real all-to-all (on a CPU it gathers everything instead), and reduce-scatter is a ring (gloo's own sends "
            "twice as much)."
        )
    return tuple(lines)


def _module_lines(measurements: Sequence[Measurement], found: Sequence[Standing]) -> list[str]:
    """The module timed alone beside whole steps: where the plans differ most, and least hidden by the rest."""
    module = next((m.module_times.module for m in measurements if m.module_times is not None), None)
    noise = next(
        (s.module_ratio for m, s in zip(measurements, found, strict=True) if m.repeats is not None), None
    )
    return [
        f"{module} alone: " + _against(s.label, found[0].label, s.module_ratio, noise, "forward and backward")
        for m, s in zip(measurements, found, strict=True)
        if s.module_ratio is not None and m.repeats is None
    ]


def notes(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """What the exact sizes show beside the times."""
    lines = []
    for m in measurements:
        if m.repeats is None and m.memory.gradient_bytes > m.memory.parameter_bytes:
            lines.append(
                f"{m.label}: gradients take {m.memory.gradient_bytes / 2**20:.0f} MiB on a rank where its parameters take "
                f"{m.memory.parameter_bytes / 2**20:.0f} MiB: some gradient is not sharded as its parameter is."
            )
        mean = m.wire_bytes
        if m.repeats is None and mean and m.wire_bytes_largest_rank > 1.1 * mean:
            lines.append(
                f"{m.label}: the rank that sends most sends {m.wire_bytes_largest_rank / mean:.2f} times the mean; the slowest rank sets the time."
            )
    pairwise = [m.label for m in measurements if m.repeats is None and _pairwise_reduce_scatter(m)]
    if pairwise:
        lines.append(
            f"{', '.join(pairwise)}: reduce-scatters are carried out as an all-to-all and a local sum, (n-1)/n on the wire; gloo's own, "
            "which PyTorch's styles use, sends twice that at 2 ranks."
        )
    return tuple(lines)


def _pairwise_reduce_scatter(m: Measurement) -> bool:
    kinds = {use.kind for use in m.collectives}
    return (
        m.engine == "native"
        and CollectiveKind.ALL_TO_ALL in kinds
        and CollectiveKind.REDUCE_SCATTER not in kinds
    )


def _against(label: str, first: str, ratio: Ratio, noise: Ratio | None, what: str) -> str:
    if ratio.confidence < CONFIDENCE:
        return f"{label} against {first}: {_interval(ratio)} of its time per {what}. Too few rounds to tell a difference; use --rounds 6 or more."
    if ratio.holds_one:
        return f"No difference seen between {label} and {first}: {_interval(ratio)} of its time per {what}."
    word = "faster" if ratio.median < 1 else "slower"
    percent = abs(1 - ratio.median) * 100
    line = f"{label} is {word} than {first}: {_interval(ratio)} of its time per {what}, {percent:.0f} % {'less' if ratio.median < 1 else 'more'}."
    if noise is not None and noise.low <= ratio.median <= noise.high:
        line += " That is within this machine's noise."
    return line


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.confidence * 100:.0f} % interval {ratio.low:.3f} to {ratio.high:.3f}, {ratio.pairs} pairs)"
