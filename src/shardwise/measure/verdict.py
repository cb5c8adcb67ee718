"""From measurements to an answer in words: each plan against the first, the noise, and what the numbers do
not say."""

from collections.abc import Sequence
from statistics import median

from shardwise.core.collective import CollectiveKind
from shardwise.core.measurement import Measurement, Ratio, Standing
from shardwise.measure.statistics import CONFIDENCE, paired_ratio


def standings(measurements: Sequence[Measurement], tokens: int | None) -> tuple[Standing, ...]:
    """Every plan's median time and ratio to the first. tokens: of one step over all ranks; None where a
    module alone was measured."""
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


def noise_of(measurements: Sequence[Measurement], compared: Sequence[Standing]) -> Ratio | None:
    """The ratio of the first plan's second run to its first."""
    return next((s.ratio for m, s in zip(measurements, compared, strict=True) if m.repeats is not None), None)


def verdict(
    measurements: Sequence[Measurement], compared: Sequence[Standing], *, what: str, backend: str
) -> tuple[str, ...]:
    """One sentence per plan against the first, the noise floor, and on gloo why the ranking need not hold
    elsewhere."""
    noise = noise_of(measurements, compared)
    first, *others = compared
    again = {measurement.label for measurement in measurements if measurement.repeats is not None}
    plans = [each for each in others if each.label not in again]
    lines = [_against(each.label, first.label, each.ratio, noise, what) for each in plans if each.ratio]
    module = next((m.module_times.module for m in measurements if m.module_times is not None), None)
    module_noise = next((each.module_ratio for each in others if each.label in again), None)
    for (
        each
    ) in plans:  # timed alone, beside whole steps: where the plans differ most, least hidden by the rest
        if each.module_ratio is not None:
            words = _against(each.label, first.label, each.module_ratio, module_noise, "forward and backward")
            lines.append(f"{module} alone: {words}")
    if noise is not None:
        loud = (
            ""
            if noise.holds_one or noise.confidence < CONFIDENCE
            else " It leaves out 1, so this machine was not quiet: differences of this size mean nothing "
            "here."
        )
        lines.append(f"Noise floor: {first.label} against itself: {_interval(noise)}.{loud}")
    if backend == "gloo":
        lines.append(
            "Measured on gloo over loopback: the ranking need not hold on NCCL. There the wire is faster by "
            "far, look-ups and copies run on the GPU, DTensor uses a real all-to-all (on a CPU it gathers "
            "everything instead), and reduce-scatter is a ring (gloo's own sends twice as much)."
        )
    return tuple(lines)


def notes(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """What the exact sizes show beside the times."""
    lines = []
    plans = [each for each in measurements if each.repeats is None]
    for plan in plans:
        gradients, parameters = plan.memory.gradient_bytes, plan.memory.parameter_bytes
        if gradients > parameters:
            lines.append(
                f"{plan.label}: gradients take {_mib(gradients)} on a rank where its parameters take "
                f"{_mib(parameters)}: some gradient is not sharded as its parameter is."
            )
        mean, largest = plan.wire_bytes, plan.wire_bytes_largest_rank
        if mean and largest > 1.1 * mean:
            lines.append(
                f"{plan.label}: the rank that sends most sends {largest / mean:.2f} times the mean; "
                "the slowest rank sets the time."
            )
    pairwise = ", ".join(plan.label for plan in plans if _pairwise_reduce_scatter(plan))
    if pairwise:
        lines.append(
            f"{pairwise}: reduce-scatters are carried out as an all-to-all and a local sum, (n-1)/n on the "
            "wire; gloo's own, which PyTorch's styles use, sends twice that at 2 ranks."
        )
    return tuple(lines)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 10 * 2**20 else f"{n_bytes / 2**10:,.0f} KiB"


def _pairwise_reduce_scatter(m: Measurement) -> bool:
    kinds = {use.kind for use in m.collectives}
    is_sum_of_parts = CollectiveKind.ALL_TO_ALL in kinds and CollectiveKind.REDUCE_SCATTER not in kinds
    return m.engine == "native" and is_sum_of_parts


def _against(label: str, first: str, ratio: Ratio, noise: Ratio | None, what: str) -> str:
    size = f"{_interval(ratio)} of its time per {what}"
    if ratio.confidence < CONFIDENCE:
        return (
            f"{label} against {first}: {size}. Too few rounds to tell a difference; use --rounds 6 or more."
        )
    if ratio.holds_one:
        return f"No difference seen between {label} and {first}: {size}."
    word, more = ("faster", "less") if ratio.median < 1 else ("slower", "more")
    line = f"{label} is {word} than {first}: {size}, {abs(1 - ratio.median) * 100:.0f} % {more}."
    if noise is not None and noise.low <= ratio.median <= noise.high:
        line += " That is within this machine's noise."
    return line


def _interval(ratio: Ratio) -> str:
    confidence = f"{ratio.confidence * 100:.0f} % interval {ratio.low:.3f} to {ratio.high:.3f}"
    return f"{ratio.median:.3f} ({confidence}, {ratio.pairs} pairs)"
