"""Explanation: a Program told to people: every collective and copy with its reason, what a rank holds, what
lives at the peak, findings.

Groups: what differs in nothing but the number of its layer is one group; modules are then named as in plans
(`layers.*.attention`), and `count` says how often it happens in a step. Bytes of a group are those of one of
its members; totals are properties.
"""

from dataclasses import dataclass

from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.finding import Finding
from shardwise.core.placement import Placement
from shardwise.core.program import ByData, MemoryKind, MemoryPeak, Phase, StageShare
from shardwise.core.rule import RuleRef


@dataclass(frozen=True, slots=True)
class CollectiveGroup:
    """Equal collectives. reason: why it is there, a sentence. copied_bytes: copied right before or after
    each, to and from its buffers.

    carries_out: the collective that it stands for, where it is another (a reduce-scatter as an all-to-all and
    a local sum).
    """

    kind: CollectiveKind
    carries_out: CollectiveKind
    axis: str
    axis_size: int
    phase: Phase
    module: str
    rule: RuleRef | None
    before: Placement | None
    after: Placement | None
    dtype: str
    count: int
    payload_bytes: int
    wire_bytes: float
    copied_bytes: int
    by_data: ByData | None
    reason: str

    @property
    def total_wire_bytes(self) -> float:
        return self.count * self.wire_bytes


@dataclass(frozen=True, slots=True)
class CopyGroup:
    """Equal copies: n_bytes are written by each."""

    op: str
    phase: Phase
    module: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    n_bytes: int
    reason: str

    @property
    def total_bytes(self) -> int:
        return self.count * self.n_bytes


@dataclass(frozen=True, slots=True)
class PhaseTotals:
    """All that a rank does in one phase. moved_bytes: read and written by ops. unknown_ops: those that the
    catalogue doesn't know."""

    phase: Phase
    ops: int
    unknown_ops: int
    flops: int
    moved_bytes: int
    collectives: int
    wire_bytes: float


@dataclass(frozen=True, slots=True)
class HoldingGroup:
    """Equal parameters: what this rank keeps of each. See program.Holding; bytes are those of one of them."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placement: tuple[Placement, ...]
    grad_placement: tuple[Placement, ...] | None
    grad_shape: tuple[int, ...] | None
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    rule: RuleRef | None

    @property
    def total_bytes(self) -> int:
        return self.count * (self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes)


@dataclass(frozen=True, slots=True)
class RuleSummary:
    """A rule of the plan: how many modules it holds for, and the first of them."""

    pattern: str
    style: str
    modules: int
    example: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """One plan on one mesh, as one rank runs it.

    sharded_share: share of the model's parameters of which this rank keeps a part only, 0 to 1. held: exact
    bytes of parameters, gradients and optimizer state. peak: see program.memory_peak; its holders are grouped
    over layers. stages: of the pipeline, where there is one.
    """

    model: str
    parameters: int
    plan: str
    engine: str
    device: str
    rank: int
    axes: tuple[tuple[str, int], ...]
    settings: StepSettings
    layers: tuple[str, int] | None
    collectives: tuple[CollectiveGroup, ...]
    copies: tuple[CopyGroup, ...]
    phases: tuple[PhaseTotals, ...]
    holdings: tuple[HoldingGroup, ...]
    rules: tuple[RuleSummary, ...]
    sharded_share: float
    held: tuple[tuple[MemoryKind, int], ...]
    peak: MemoryPeak
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    stages: tuple[StageShare, ...] = ()
    schema_version: int = 1

    @property
    def wire_bytes(self) -> float:
        """What this rank sends in a step, by formula."""
        return sum(group.total_wire_bytes for group in self.collectives)


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two plans for the same model, mesh and step, side by side.

    only_first, only_second: collectives that the other hasn't, in the same module and phase. different: those
    that both have, in other sizes or numbers. lines: what it comes to, in words.
    """

    first: Explanation
    second: Explanation
    only_first: tuple[CollectiveGroup, ...]
    only_second: tuple[CollectiveGroup, ...]
    different: tuple[tuple[CollectiveGroup, CollectiveGroup], ...]
    lines: tuple[str, ...]
    schema_version: int = 1
