"""RunProfile and Difference -> rows of text for terminal and page alike. Computes shares and signs, nothing
else."""

from shardwise.core.collective import collective_name
from shardwise.core.difference import CollectiveUse, Difference, Line, RunProfile, Work
from shardwise.report.common.units import NOT_MEASURED, format_seconds


def time(ns: float | None) -> str:
    return NOT_MEASURED if ns is None else "0" if ns == 0 else format_seconds(ns / 1e9)


def signed(ns: float) -> str:
    return "0" if ns == 0 else f"{'+' if ns > 0 else '-'}{format_seconds(abs(ns) / 1e9)}"


def work_name(work: Work) -> str:
    """all-gather of layers.*.attention; gemm_kernel in aten::mm."""
    if work.of_class == "communication":
        return f"{collective_name(work.name)} of {work.op}" if work.op else collective_name(work.name)
    return (
        f"{shortened(work.name, 72)} in {shortened(work.op, 40)}"
        if work.op and work.op != work.name
        else shortened(work.name, 90)
    )


def speed(use: CollectiveUse) -> str:
    if use.bus_bytes_per_s is None:
        return NOT_MEASURED
    return f"{'≤ ' if use.is_bound else ''}{use.bus_bytes_per_s / 1e9:.3g} GB/s"


def late(use: CollectiveUse) -> str:
    """Which rank the others waited for, how much of the waiting, and what it was doing."""
    if use.late is None:
        return ""
    rank, share, doing = use.late
    return f"rank {rank} ({100 * share:.0f} %){': ' + doing if doing else ''}"


def what(line: Line) -> str:
    """The line's name: long kernels cut in the middle, so that head and tail tell variants apart."""
    return shortened(line.what, 72)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 13]}…{text[-12:]}"


def shapes(line: Line) -> str:
    tensors = line.shapes.removeprefix("[").removesuffix("]").replace("],[", "] [").split()
    return shortened(" ".join(tensor for tensor in tensors if tensor != "[]"), 48)


def books(difference: Difference) -> list[tuple[str, float, float]]:
    """How the lines add up to the step: (label, first, second)."""
    first, second = difference.first, difference.second
    idle = [run.parts.cpu_bound_idle_ns + run.parts.other_idle_ns for run in (first, second)]
    return [
        ("all work, summed", first.lines_ns, second.lines_ns),
        ("- at the same time", first.at_once_ns, second.at_once_ns),
        ("= busy", first.busy_ns, second.busy_ns),
        ("+ idle", idle[0], idle[1]),
        ("= step", first.step_ns, second.step_ns),
    ]


def about(run: RunProfile) -> str:
    """`8 ranks, 6 steps, NVIDIA A100`."""
    ranks = f"{len(run.ranks)} ranks" if len(run.ranks) > 1 else f"rank {run.ranks[0]}"
    numbered = {step.step for step in run.steps if step.step is not None}
    steps = (
        f"{len(numbered)} step{'s' * (len(numbered) > 1)}"
        if numbered
        else "no steps marked: all work as one window"
    )
    where = ", ".join(value for key, value in run.facts if key in ("device", "backend"))
    return ", ".join(part for part in (ranks, steps, where or None) if part) + (
        "" if run.has_device else ", no device: CPU work"
    )


def cautions(run: RunProfile) -> list[str]:
    """What was lost, refused or corrected."""
    said = [
        f"{loss.count:,} event{'s' * (loss.count > 1)} {loss.what}"
        if loss.what.startswith("mended")
        else f"lost: {loss.count:,} x {loss.what}"
        for loss in run.losses
    ]
    missing, launches = run.without_kernel
    if missing:
        said.append(
            f"{missing:,} of {launches:,} launches left no kernel in the file: its recording began later, or "
            "lost them"
        )
    if run.too_fast and run.link_bytes_per_s is not None:
        said.append(
            f"{run.too_fast:,} collectives seem faster than the device's links "
            f"({run.link_bytes_per_s / 1e9:.0f} GB/s a direction): data moved before the last "
            "rank came, the switch reduced it, or the sizes in the file are wrong"
        )
    said += [f"{refused.count:,} collectives not split: {refused.why}" for refused in run.sharing.refused]
    off = [clock for clock in run.sharing.clocks if clock.offset_ns]
    if off:
        most = max(off, key=lambda clock: abs(clock.offset_ns or 0))
        said.append(
            f"clocks corrected by the ends of {most.collectives:,} collectives: by up to "
            f"{time(abs(most.offset_ns or 0))} (rank {most.rank}); "
            "in half of them the ranks' ends then lie no more than "
            f"{time(max(clock.spread_ns or 0 for clock in off))} apart"
        )
    unknown = [clock.rank for clock in run.sharing.clocks if clock.offset_ns is None]
    if unknown:
        said.append(f"no collective says how the clocks of ranks {', '.join(map(str, unknown))} stand")
    return said
