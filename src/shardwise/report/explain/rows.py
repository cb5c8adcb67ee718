"""What of an Explanation stands together in a report: groups by phase, sums of what is alike,
and the words for them.

Adds up and looks up, no more. Names that come from a user's files are cut to what a reader can take in. What
it does not know: how a row is drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

from shardwise.core.collective import TO_ONE_RANK, CollectiveKind, collective_name
from shardwise.core.explanation import CollectiveGroup, Explanation, HoldingGroup, PhaseTotals
from shardwise.core.placement import Placement
from shardwise.core.program import MemoryKind, Phase
from shardwise.report.common.plain import name
from shardwise.report.common.units import format_bytes

# The phases whose work grows with the model's layers; the others happen once in a step.
LAYER_PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE)

UNTOLD = "not told"

KIND_PLURALS = {
    MemoryKind.PARAMETER: "parameters",
    MemoryKind.GRADIENT: "gradients",
    MemoryKind.OPTIMIZER: "optimizer",
    MemoryKind.BUFFER: "buffers",
    MemoryKind.INPUT: "inputs",
    MemoryKind.ACTIVATION: "activations",
    MemoryKind.TEMPORARY: "temporary",
    MemoryKind.WORKSPACE: "libraries' workspaces",
}


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One phase: its totals (None where the explanation has none) and its groups of collectives, in order."""

    phase: Phase
    totals: PhaseTotals | None
    groups: tuple[CollectiveGroup, ...]

    @property
    def tally(self) -> "Tally":
        return tally(self.groups)


@dataclass(frozen=True, slots=True)
class Tally:
    """Collectives added up: how many of each kind (by what they carry out), and the bytes that this rank
    sends for them."""

    counts: tuple[tuple[CollectiveKind, int], ...]
    wire_bytes: float

    @property
    def count(self) -> int:
        return sum(count for _, count in self.counts)

    def __str__(self) -> str:
        """`65 all-gathers, 65 reduce-scatters, 14.2 GiB sent`."""
        if not self.counts:
            return "no collectives"
        kinds = (f"{count} {collective_name(kind)}{'' if count == 1 else 's'}" for kind, count in self.counts)
        return f"{', '.join(kinds)}, {format_bytes(self.wire_bytes)} sent"


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Bytes of one kind: what a rank keeps of it (None where that isn't kept from step to step), and what
    lives of it at the peak."""

    kind: MemoryKind
    held: int | None
    at_peak: int


def plan_name(explanation: Explanation) -> str:
    return name(explanation.plan, "(no plan)")


def carried_out_as(group: CollectiveGroup) -> str | None:
    """`all-to-all + sum` for a reduce-scatter that is carried out so; None for a collective that is what it
    is."""
    match group.carries_out, group.kind:
        case carried, kind if carried == kind:
            return None
        case CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_TO_ALL:
            return "all-to-all + sum"
        case CollectiveKind.ALL_TO_ALL, CollectiveKind.ALL_GATHER:
            return "all-gather + chunk"
        case _:
            return collective_name(group.kind)


def placement_change(group: CollectiveGroup) -> str:
    """`Partial -> Shard(1)`; what nobody told is said to be so. Empty for what goes from one rank to another,
    which turns no placement into another."""
    if group.before is None and group.after is None:
        return "" if group.kind in TO_ONE_RANK else UNTOLD
    return f"{group.before or UNTOLD} -> {group.after or UNTOLD}"


def wire_share(group: CollectiveGroup) -> str | None:
    """What part of the payload a rank sends, where that is one of the formulas' fractions: `7/8`, `2 x 7/8`,
    `all`, `none`."""
    n = group.axis_size
    if not group.payload_bytes or not math.isfinite(group.wire_bytes):
        return None
    share = group.wire_bytes / group.payload_bytes
    shares = {"none": 0.0, "all": 1.0, f"{n - 1}/{n}": (n - 1) / n, f"2 x {n - 1}/{n}": 2 * (n - 1) / n}
    # a splitting into parts that differ by a row is no simple fraction
    return next((text for text, value in shares.items() if math.isclose(share, value, rel_tol=1e-9)), None)


def rule_text(group: CollectiveGroup) -> str | None:
    """`gather_input` for the rule of the module itself; `rule "layers.*" (fsdp)` for one that holds further
    out; None for none."""
    if group.rule is None:
        return None
    return name(group.rule.style) if group.rule.pattern == group.module else f"rule {name(str(group.rule))}"


def by_data_text(group: CollectiveGroup) -> str | None:
    """What the data decide, as a sentence; None where shapes alone decide."""
    by_data = group.by_data
    if by_data is None:
        return None
    if by_data.expert_load is not None:
        mean, most = format_bytes(by_data.mean_bytes), format_bytes(by_data.max_bytes)
        load = (
            f"load is taken to be balanced, and then each rank sends {mean}"
            if by_data.expert_load == 1
            else f"rank {by_data.max_rank}'s experts are taken to get {by_data.expert_load:g} times the "
            f"mean's tokens, and then it takes or sends {most}, a rank on average {mean}"
        )
        return (
            f"Decided by the router, of which a trace knows nothing: {load}; no choice needs more than "
            f"{format_bytes(by_data.bound_bytes)}."
        )
    return (
        f"Decided by the data: this rank sends {format_bytes(group.wire_bytes)}, the ranks "
        f"{format_bytes(by_data.mean_bytes)} on average, "
        f"rank {by_data.max_rank} most with {format_bytes(by_data.max_bytes)}; no batch needs more than "
        f"{format_bytes(by_data.bound_bytes)}."
    )


def copied_text(group: CollectiveGroup) -> str | None:
    """The copies to and from the buffers of each, as a sentence; None where there are none."""
    return (
        f"Copies {format_bytes(group.copied_bytes)} to and from its buffers each time."
        if group.copied_bytes
        else None
    )


def phase_rows(explanation: Explanation) -> tuple[PhaseRow, ...]:
    """The phases that have ops or collectives, in the order of a step; a forward that runs again stands after
    the backward."""
    totals = {each.phase: each for each in explanation.phases}
    rows = (
        PhaseRow(
            phase,
            totals.get(phase),
            tuple(group for group in explanation.collectives if group.phase == phase),
        )
        for phase in Phase
    )
    return tuple(row for row in rows if row.totals is not None or row.groups)


def tally(groups: Iterable[CollectiveGroup]) -> Tally:
    """The sum over groups."""
    together = list(groups)
    counts = {
        kind: sum(group.count for group in together if group.carries_out == kind) for kind in CollectiveKind
    }
    return Tally(
        tuple((kind, count) for kind, count in counts.items() if count),
        sum(group.total_wire_bytes for group in together),
    )


def layer_tally(explanation: Explanation) -> Tally:
    """Forward and backward together."""
    return tally(group for group in explanation.collectives if group.phase in LAYER_PHASES)


def memory_rows(explanation: Explanation) -> tuple[MemoryRow, ...]:
    """A row for each kind that is held or lives at the peak."""
    held, at_peak = dict(explanation.held), dict(explanation.peak.by_kind)
    return tuple(
        MemoryRow(kind, held.get(kind), at_peak.get(kind, 0))
        for kind in MemoryKind
        if kind in held or kind in at_peak
    )


def held_bytes(explanation: Explanation) -> int:
    """Parameters, gradients and optimizer state together."""
    return sum(n_bytes for _, n_bytes in explanation.held)


def held_text(row: MemoryRow) -> str:
    """`3.74 GiB`, or a dash for what comes and goes within a step."""
    return format_bytes(row.held, "–")


def at_peak_text(row: MemoryRow) -> str:
    """Bytes at the peak; what is held but doesn't live then is named so."""
    return (
        format_bytes(row.at_peak)
        if row.at_peak
        else "not yet"
        if row.kind is MemoryKind.GRADIENT and row.held
        else "0 B"
    )


def peak_text(explanation: Explanation) -> str:
    """`in the loss, at aten::exp in (loss)`."""
    peak = explanation.peak
    if not peak.doing:
        return "before the step's first op: nothing in the step needs more"
    return f"in {phase_text(peak.phase)}, at {name(peak.doing)} in {name(peak.module)}"


def phase_text(phase: Phase) -> str:
    """A phase within a sentence."""
    match phase:
        case Phase.RECOMPUTE:
            return "the recomputed forward"
        case Phase.REDUCE:
            return "the reduction of gradients"
        case Phase.CLIP:
            return "clipping"
        case Phase.FORWARD | Phase.LOSS | Phase.BACKWARD | Phase.OPTIMIZER:
            return f"the {phase.value}"
        case _:
            assert_never(phase)


def world_size(explanation: Explanation) -> int:
    """Ranks of the whole mesh."""
    return math.prod(size for _, size in explanation.axes)


def mesh_text(explanation: Explanation) -> str:
    """`dp=2,tp=4`."""
    return ",".join(f"{name(axis)}={size}" for axis, size in explanation.axes) or "one rank"


def shape_text(shape: Sequence[int]) -> str:
    """`[4096, 512]`; `scalar` for no dims."""
    return f"[{', '.join(map(str, shape))}]" if shape else "scalar"


def part_text(group: HoldingGroup) -> str:
    """What the rank has of a parameter: its shape, or that it is whole."""
    return "all of it" if group.shape == group.local_shape else shape_text(group.local_shape)


def placements_text(placements: Sequence[Placement], axes: Sequence[tuple[str, int]]) -> str:
    """`Shard(0)` on one axis; `dp: Replicate, tp: Shard(0)` on several."""
    if len(placements) == 1:
        return str(placements[0])
    if len(placements) != len(axes):
        return ", ".join(map(str, placements)) or UNTOLD
    return ", ".join(
        f"{name(axis)}: {placement}" for placement, (axis, _) in zip(placements, axes, strict=True)
    )


def gradient_text(group: HoldingGroup, axes: Sequence[tuple[str, int]]) -> str:
    """`the same` as the parameter, or what it is instead: `Replicate [128256, 4096]`; `none`."""
    if group.grad_placement is None:
        return "none"
    if not gradient_differs(group):
        return "the same"
    shape = (
        ""
        if group.grad_shape is None or group.grad_shape == group.local_shape
        else f" {shape_text(group.grad_shape)}"
    )
    return f"{placements_text(group.grad_placement, axes)}{shape}"


def gradient_differs(group: HoldingGroup) -> bool:
    """Whether the optimizer meets a gradient of another placement or shape than its parameter's."""
    if group.grad_placement is None:
        return False
    return group.grad_placement != group.placement or group.grad_shape not in (None, group.local_shape)
