"""RunProfile and Difference -> rows of text for terminal and page alike. Computes shares and signs, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.core.difference import CollectiveUse, Difference, Line, RunProfile, Use, Work
from shardwise.core.parts import Parts
from shardwise.report.common.units import NOT_MEASURED, format_seconds

PARTS = (
    ("compute", "compute"),
    ("exposed_waiting", "exposed waiting for ranks"),
    ("exposed_transfer", "exposed transfer"),
    ("exposed_communication", "exposed communication, not split"),
    ("exposed_copy", "exposed copies"),
    ("cpu_bound_idle", "idle: the CPU was behind"),
    ("other_idle", "other idle"),
)
MEANINGS = {
    "compute": "kernels that are neither communication nor copies",
    "exposed_waiting": "in a collective before its last rank came, with no compute beside it",
    "exposed_transfer": "in a collective after its last rank came, with no compute beside it",
    "exposed_communication": "in a collective of which it isn't known when the last rank came, with no compute beside it",
    "exposed_copy": "copies and fills with nothing beside them",
    "cpu_bound_idle": "nothing runs, and the next work had not been launched yet",
    "other_idle": "nothing runs, though the next work had been launched",
    "idle": "nothing runs",
}


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of the step in one run or two."""

    key: str
    label: str
    ns: tuple[float, ...]
    share: tuple[float, ...]

    @property
    def delta_ns(self) -> float:
        return self.ns[-1] - self.ns[0]


def part_rows(runs: Sequence[RunProfile]) -> list[PartRow]:
    """Parts that some run has."""
    rows = []
    for key, label in parts_of([run.parts for run in runs]):
        values = tuple(part_ns(run.parts, key) for run in runs)
        rows.append(
            PartRow(
                key,
                label,
                values,
                tuple(value / run.step_ns for value, run in zip(values, runs, strict=True)),
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class Segment:
    """A part in a stacked bar; percent: of the longest bar."""

    key: str
    label: str
    text: str
    percent: float


@dataclass(frozen=True, slots=True)
class Stack:
    """A run's step as one stacked bar."""

    label: str
    total: str
    segments: tuple[Segment, ...]


def part_stacks(runs: Sequence[tuple[str, Parts]]) -> list[Stack]:
    """A bar for each (label, parts), on one scale."""
    longest = max((parts.total_ns for _, parts in runs), default=0) or 1
    return [
        Stack(
            label,
            time(parts.total_ns),
            tuple(
                Segment(key, name, f"{time(ns)} ({100 * ns / parts.total_ns:.1f} %)", 100 * ns / longest)
                for key, name in PARTS
                if (ns := part_ns(parts, key))
            ),
        )
        for label, parts in runs
    ]


def parts_of(found: Sequence[Parts]) -> list[tuple[str, str]]:
    """(key, label) of the parts that some of them have."""
    return [(key, label) for key, label in PARTS if any(part_ns(parts, key) for parts in found)]


def part_ns(parts: Parts, key: str) -> float:
    return float(getattr(parts, f"{key}_ns"))


def time(ns: float | None) -> str:
    return NOT_MEASURED if ns is None else "0" if ns == 0 else format_seconds(ns / 1e9)


def signed(ns: float) -> str:
    return "0" if ns == 0 else f"{'+' if ns > 0 else '-'}{format_seconds(abs(ns) / 1e9)}"


def calls(use: Use) -> str:
    """2, 0.5, 217; never 216.99999."""
    return f"{use.count:.4g}"


def collective_name(op: str) -> str:
    return op.replace("_", "-")


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
        f"{loss.count:,} events {loss.what}"
        if loss.what.startswith("mended")
        else f"lost: {loss.count:,} x {loss.what}"
        for loss in run.losses
    ]
    missing, launches = run.without_kernel
    if missing:
        said.append(
            f"{missing:,} of {launches:,} launches left no kernel in the file: its recording began later, or lost them"
        )
    if run.too_fast and run.link_bytes_per_s is not None:
        said.append(
            f"{run.too_fast:,} collectives seem faster than the device's links ({run.link_bytes_per_s / 1e9:.0f} GB/s a direction): data moved before the last "
            "rank came, the switch reduced it, or the sizes in the file are wrong"
        )
    said += [f"{refused.count:,} collectives not split: {refused.why}" for refused in run.sharing.refused]
    off = [clock for clock in run.sharing.clocks if clock.offset_ns]
    if off:
        most = max(off, key=lambda clock: abs(clock.offset_ns or 0))
        said.append(
            f"clocks corrected by the ends of {most.collectives:,} collectives: by up to {time(abs(most.offset_ns or 0))} (rank {most.rank}); "
            f"in half of them the ranks' ends then lie no more than {time(max(clock.spread_ns or 0 for clock in off))} apart"
        )
    unknown = [clock.rank for clock in run.sharing.clocks if clock.offset_ns is None]
    if unknown:
        said.append(f"no collective says how the clocks of ranks {', '.join(map(str, unknown))} stand")
    return said
