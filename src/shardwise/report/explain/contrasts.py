"""Two plans in two columns: what of a Contrast stands side by side in a report. Adds up and looks up, no
more."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.core.collective import CollectiveKind, collective_name
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.finding import Finding
from shardwise.core.program import MemoryKind, Phase
from shardwise.report.common.plain import name
from shardwise.report.common.units import format_bytes, format_flops, format_ratio
from shardwise.report.explain.rows import KIND_PLURALS, held_bytes, memory_rows, tally


@dataclass(frozen=True, slots=True)
class ContrastRow:
    """One line of two columns. ratio: second over first; None where there is none to give."""

    label: str
    first: str
    second: str
    ratio: str | None = None
    is_heading: bool = False

    @property
    def differs(self) -> bool:
        return self.first != self.second


def findings_of(contrast: Contrast) -> tuple[tuple[str, Finding], ...]:
    """(plan, finding) of both; one that both have stands once, for "both plans"."""
    first, second = contrast.first, contrast.second
    shared = [finding for finding in first.findings if finding in second.findings]
    own = [
        (one.plan, finding) for one in (first, second) for finding in one.findings if finding not in shared
    ]
    return (*own, *(("both plans", finding) for finding in shared))


def rows_of(contrast: Contrast) -> tuple[ContrastRow, ...]:
    """Two plans in two columns: collectives, bytes, memory, work, findings."""
    first, second = contrast.first, contrast.second
    return (
        ContrastRow("engine", name(first.engine), name(second.engine)),
        *_collective_rows(first, second),
        *_memory_contrast(first, second),
        *_work_rows(first, second),
        _heading("Findings"),
        ContrastRow("findings", str(len(first.findings) or "none"), str(len(second.findings) or "none")),
    )


def _collective_rows(first: Explanation, second: Explanation) -> Iterator[ContrastRow]:
    one, other = dict(tally(first.collectives).counts), dict(tally(second.collectives).counts)
    yield _heading("Collectives")
    for kind in CollectiveKind:
        if kind in one or kind in other:
            yield ContrastRow(f"{collective_name(kind)}s", str(one.get(kind, 0)), str(other.get(kind, 0)))
    yield _heading("Sent by the rank")
    for phase in Phase:
        mine, theirs = (
            [group for group in side.collectives if group.phase == phase] for side in (first, second)
        )
        if mine or theirs:
            yield _bytes_row(phase.value, tally(mine).wire_bytes, tally(theirs).wire_bytes)
    yield _bytes_row("in all", first.wire_bytes, second.wire_bytes)


def _memory_contrast(first: Explanation, second: Explanation) -> Iterator[ContrastRow]:
    one, other = {row.kind: row for row in memory_rows(first)}, {row.kind: row for row in memory_rows(second)}
    kinds = [kind for kind in MemoryKind if kind in one or kind in other]
    yield _heading("Held: parameters, gradients, optimizer state")
    for kind in kinds:
        held = [kinds_of[kind].held if kind in kinds_of else None for kinds_of in (one, other)]
        if held != [None, None]:
            yield _bytes_row(KIND_PLURALS[kind], *held)
    yield _bytes_row("in all", held_bytes(first), held_bytes(second))
    yield _heading("At the peak")
    for kind in kinds:
        at_peak = [kinds_of[kind].at_peak if kind in kinds_of else 0 for kinds_of in (one, other)]
        if any(at_peak):
            yield _bytes_row(KIND_PLURALS[kind], *at_peak)
    yield _bytes_row("in all", first.peak.n_bytes, second.peak.n_bytes)
    when, other_when = (side.peak.phase.value if side.peak.doing else "at rest" for side in (first, second))
    yield ContrastRow("when", when, other_when)


def _work_rows(first: Explanation, second: Explanation) -> Iterator[ContrastRow]:
    yield _heading("Work of the rank")
    flops = [sum(totals.flops for totals in side.phases) for side in (first, second)]
    yield ContrastRow("FLOPs", format_flops(flops[0]), format_flops(flops[1]), _ratio(*flops))
    yield _bytes_row(
        "moved by ops", *(sum(totals.moved_bytes for totals in side.phases) for side in (first, second))
    )
    yield _bytes_row("copied", *(sum(group.total_bytes for group in side.copies) for side in (first, second)))
    unknown = [sum(totals.unknown_ops for totals in side.phases) for side in (first, second)]
    if any(unknown):
        yield ContrastRow("unknown ops", str(unknown[0]), str(unknown[1]))


def _heading(label: str) -> ContrastRow:
    return ContrastRow(label, "", "", is_heading=True)


def _bytes_row(label: str, first: float | None, second: float | None) -> ContrastRow:
    return ContrastRow(
        label, format_bytes(first, "none"), format_bytes(second, "none"), _ratio(first, second)
    )


def _ratio(first: float | None, second: float | None) -> str | None:
    if not first or second is None or not math.isfinite(first) or not math.isfinite(second):
        return None
    ratio = second / first
    return (
        "equal"
        if first == second
        else "none"
        if not second
        else "x < 0.001"
        if ratio < 0.0005
        else f"x {format_ratio(ratio)}"
    )
