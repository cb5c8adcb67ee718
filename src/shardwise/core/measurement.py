"""Measurement: what a run of plans on real ranks showed. All times in seconds, all sizes in bytes.

A number that was not measured is None and its absence is said; it is never 0.
"""

from dataclasses import dataclass

from shardwise.core.beside import TermLine
from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.expert_load import ExpertLoad
from shardwise.core.parts import Parts
from shardwise.core.verification import Agreement


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """One rank's memory; the largest over the ranks where they differ.

    parameter, gradient, optimizer: exact, from the tensors. active, reserved: peak over a step, from
    torch.cuda.memory_stats (None on a CPU). resident: peak growth of the process's resident set from before
    the model was built to the end of a step (None on CUDA).
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    active_bytes: int | None = None
    reserved_bytes: int | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class CollectiveUse:
    """All collectives of one kind, axis and phase in one step: mean over the ranks, and the largest rank's
    wire bytes."""

    kind: CollectiveKind
    axis: str
    phase: str
    count: int
    payload_bytes: float
    wire_bytes: float
    wire_bytes_largest_rank: float


@dataclass(frozen=True, slots=True)
class ModuleTimes:
    """One module alone, forward and backward, a pair of times per round: each rank's median of a few runs,
    then the slowest rank's."""

    module: str
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    @property
    def total_s(self) -> tuple[float, ...]:
        return tuple(f + b for f, b in zip(self.forward_s, self.backward_s, strict=True))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One plan's run. `label` is the plan's name; `repeats` is the label that it repeats, for the run that
    shows the noise (A/A). plan_toml: of hf, own and unsharded the rules as comments, where they are known.

    step_s: one time per round, the slowest rank's. rank_step_s: the same per rank. losses, grad_norms: one
    per step from the first (warm-up included), equal on all ranks. sent_bytes: what the ranks' sockets sent
    in one step, mean over ranks (gloo on Linux only). loads: what routers chose in the first step, of each
    mixture of experts.
    """

    label: str
    repeats: str | None
    plan_name: str
    plan_toml: str
    engine: str
    step_s: tuple[float, ...]
    rank_step_s: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    memory: MemoryUse
    collectives: tuple[CollectiveUse, ...]
    wire_bytes_largest_rank: float
    sent_bytes: float | None
    module_times: ModuleTimes | None
    agreement: Agreement | None
    loads: tuple[ExpertLoad, ...] = ()

    @property
    def wire_bytes(self) -> float:
        """What one rank sends in a step, by formula; mean over the ranks."""
        return sum(use.wire_bytes for use in self.collectives)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios and its distribution-free confidence interval (order statistics of the
    pairs)."""

    median: float
    low: float
    high: float
    confidence: float
    pairs: int

    @property
    def holds_one(self) -> bool:
        return self.low <= 1.0 <= self.high


@dataclass(frozen=True, slots=True)
class Standing:
    """One plan against the first: its time over the first plan's, and its throughput. Summary of a
    Measurement.

    module_ratio: the same ratio for the module timed alone, forward and backward together.
    """

    label: str
    step_s: float
    tokens_per_s: float | None
    ratio: Ratio | None
    module_forward_s: float | None
    module_backward_s: float | None
    module_ratio: Ratio | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a run took place: what a reader needs to judge its numbers or repeat it."""

    command: str
    started: str
    machine: str
    device: str
    backend: str
    world_size: int
    threads_per_rank: int
    cores: int
    memory_bytes: int | None
    versions: tuple[tuple[str, str], ...]
    variables: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TextSummary:
    """Where the token ids came from. `distinct_ids`: how many of the model's vocabulary occur in the
    stream. `digest`: of the ids in their order."""

    source: str
    tokenizer: str
    tokens: int
    distinct_ids: int
    vocab_size: int
    digest: str
    documents: int = 1


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where a plan's step went, by its profiles: `parts` in nanoseconds per step of one rank, mean over
    `steps` of all ranks.

    overlap_ns: how much of communication_ns compute hides. words: what can be said of its collectives.
    traces: their folder. terms, terms_words: the step as it was predicted beside this one, and what that
    says; empty where no machine was given.
    """

    label: str
    steps: int
    parts: Parts
    communication_ns: float
    overlap_ns: float
    words: tuple[str, ...]
    traces: str
    terms: tuple[TermLine, ...] = ()
    terms_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer of `shardwise compare`: every plan's measurement, standing and the verdict in words.

    noise: the ratio of the first plan's second run to its first (A/A): what no difference looks like here.
    module: the one module that was measured (step_s is then its forward and backward), or None for whole
    steps. warmup: steps before the first round; losses and gradient norms hold them too. profiles: of the
    plans in their order, where they were recorded.
    """

    model: str
    parameters: int
    mesh: str
    settings: StepSettings
    module: str | None
    rounds: int
    warmup: int
    environment: Environment
    text: TextSummary
    measurements: tuple[Measurement, ...]
    standings: tuple[Standing, ...]
    noise: Ratio | None
    verdict: tuple[str, ...]
    notes: tuple[str, ...] = ()
    profiles: tuple[StepProfile, ...] = ()
    schema_version: int = 1
