"""Search: what is searched for the best plan of a model on a machine, and what was found. Standard library
only.

A Space says which decisions are open; a Candidate is one way to decide all of them. What a candidate costs
is predict's to say; which are looked at, and when the best is proved, is search/'s."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache

from shardwise.core.case import Case, StepSettings
from shardwise.core.export import Export
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.prediction import MemoryForecast, Setup, Term
from shardwise.core.prediction_run import MachineFacts
from shardwise.core.style import StyleName
from shardwise.core.verification import Verification

CUT, WHOLE = "cut", "whole"
SEQUENCE = "sequence"
"""The group whose decision is whether what lies between the cut blocks is cut along the sequence."""
LOOK_UPS = (StyleName.ROWWISE, StyleName.COLWISE, StyleName.ROUTED, StyleName.REPLICATED)
"""The styles of a look-up of ids, the first being the default."""


def gives_parts_alone(look_up: StyleName) -> bool:
    """Whether a style of look-ups gives each rank its part of the sequence, and can't give all of it."""
    return "output" not in look_up.arguments


def can_be(styles: Mapping[str, str]) -> bool:
    """Whether choices, by group, go together: a look-up that gives parts of the sequence needs it cut."""
    alone = {str(each) for each in LOOK_UPS if gives_parts_alone(each)}
    return styles.get(SEQUENCE, CUT) == CUT or alone.isdisjoint(styles.values())


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that one decision is for, such as all layers' attention blocks: equal layers share it.
    options: of a look-up its styles, of all others whole or cut. why: an option isn't open, by its name."""

    name: str
    modules: tuple[str, ...]
    options: tuple[str, ...]
    why: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Space:
    """What is open. degrees: of each axis of the mesh, those that are tried; an axis that isn't named is free
    (tp within a node). micro_batches: sizes, in sequences of a data-parallel rank at a time. groups: by
    tensor-parallel ranks, as fewer can be cut over more of them. fixed, forbidden: as they were asked for.
    memory_bytes: what a device may hold, at most."""

    devices: int
    degrees: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[Group, ...]
    micro_batches: tuple[int, ...]
    recompute: tuple[str, ...]
    chunks: tuple[int, ...]
    reshard: tuple[bool, ...]
    memory_bytes: float
    fixed: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()


_mesh = lru_cache(65536)(Mesh)
"""Checked once, however many candidates lie on it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to decide everything. styles: (group, option); empty where tp is 1. recompute: of how many
    of the model's layers (recomputed), the first ones of each stage; 0 is none. chunks: of layers that a
    stage holds. reshard: FSDP frees a layer's parameters after its forward."""

    axes: tuple[tuple[str, int], ...]
    styles: tuple[tuple[str, str], ...]
    micro_batch: int
    micro_batches: int
    recompute: str = "none"
    recomputed: int = 0
    schedule: str | None = None
    chunks: int = 1
    reshard: bool = True

    @property
    def mesh(self) -> Mesh:
        return _mesh(self.axes)

    def without_recompute(self) -> "Candidate":
        return replace(self, recompute="none", recomputed=0)

    def style(self, group: str) -> str | None:
        """Of a group; None where nothing is cut."""
        return dict(self.styles).get(group)

    @property
    def label(self) -> str:
        """What sets it apart, in a line: `fsdp=8,tp=8 · micro-batch 1 · full recompute of 20 layers`."""
        said = [self.short_mesh, f"micro-batch {self.micro_batch}"]
        if self.recomputed:
            said.append(f"{self.recompute} recompute of {self.recomputed} layers")
        if self.chunks > 1:
            said.append(f"{self.chunks} chunks")
        if not self.reshard:
            said.append("parameters kept after the forward")
        said += [f"{group} {option}" for group, option in self.styles if option not in (CUT,)]
        return " · ".join(said)

    @property
    def short_mesh(self) -> str:
        """Without axes of one rank."""
        axes = [(name, size) for name, size in self.axes if size > 1]
        return ",".join(f"{name}={size}" for name, size in axes) or "1 device"


class Known(StrEnum):
    """How a considered candidate's step is known. predicted: its own plan was traced and predicted.
    composed: from pieces, which were. bound: it takes at least so long, and more than the best."""

    PREDICTED = "predicted"
    COMPOSED = "composed"
    BOUND = "bound"


@dataclass(frozen=True, slots=True)
class Considered:
    """One point of the picture. step_s, device_bytes: at least so much, where they are bounds."""

    candidate: Candidate
    step_s: float
    device_bytes: float
    known: Known
    fits: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A plan that is recommended, or a runner-up. plan: its text as a file, each rule under its reason;
    None where nothing is cut by rules (tp and ep are 1). settings: of the step. composed_s: what its
    pieces gave, where they were put together; step_s is predict's of the plan itself. costs: (term,
    seconds) by which it is slower than the best, largest first. is_tie: the machine file can't tell it
    from the best. proof: of its small twin on real ranks, those of proof_mesh; None where it wasn't asked
    for, and then why_unproved says why. export: its files for a framework, if they were asked for; where they
    can't be, or must not, why_not_exported says why."""

    candidate: Candidate
    plan: str | None
    settings: StepSettings
    setup: Setup
    tokens: int
    step_s: float
    composed_s: float | None
    terms: tuple[tuple[Term, float], ...]
    memory: MemoryForecast
    costs: tuple[tuple[Term, float], ...] = ()
    is_tie: bool = False
    proof: Verification | None = None
    why_unproved: str | None = None
    proof_mesh: str = ""
    export: Export | None = None
    why_not_exported: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether it was tried, and doesn't train the right model."""
        return self.proof is not None and self.proof.verdict.is_no

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.step_s / self.candidate.mesh.world_size


@dataclass(frozen=True, slots=True)
class Refused:
    """Candidates that can't be, by reason."""

    reason: str
    candidates: int


@dataclass(frozen=True, slots=True)
class Tipping:
    """How much a constant of the machine must change before another plan wins. constant: in words (`links
    within, rate`). factor: of its value; None where none between 1/4 and 4 makes another win. winner: that
    plan's place among the found ones, the best being 0."""

    constant: str
    factor: float | None
    winner: int | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """found: best first. gap: how much faster than the best, at most, something that wasn't looked at
    could still be, as a share of its step; 0: the best is proved to be. stopped: why the search ended
    early, if it did. candidates: of the space; predicted, composed: how many were costed so. Of those that
    weren't, ruled_out: how many can't be the best, or can't fit, by their bounds; unlooked: how many could
    be. error: what the machine file says of its own predictions; None where it says nothing. seconds:
    by what was done. model_there: the model as commands in the run's folder name it, where that is another
    path."""

    model: str
    machine: MachineFacts
    space: Space
    settings: StepSettings
    found: tuple[Found, ...]
    considered: tuple[Considered, ...]
    refused: tuple[Refused, ...]
    tippings: tuple[Tipping, ...]
    gap: float
    error: float | None
    candidates: int
    predicted: int
    composed: int
    traces: int
    seconds: tuple[tuple[str, float], ...]
    stopped: str | None = None
    notes: tuple[str, ...] = field(default=())
    ruled_out: int = 0
    unlooked: int = 0
    schema_version: int = 1
    model_there: str = ""

    @property
    def is_proved(self) -> bool:
        """Best in this space, by this machine file."""
        return self.gap == 0 and self.stopped is None and bool(self.found)

    def case(self, index: int, machine: str = "") -> Case:
        """Of a found plan, whose file is called plan_name(index). machine: as it was asked for, where that
        isn't its name. Raises OptionError where a case would be refused, as one of a file that somebody
        changed may be."""
        found = self.found[index]
        plan = plan_name(index) if found.plan is not None else str(TheirPlan.UNSHARDED)
        mesh = Mesh(tuple((axis, size) for axis, size in found.candidate.axes if size > 1))
        model = self.model_there or self.model
        return Case(model, mesh, (plan,), found.settings, machine=machine or self.machine.name)


def plan_name(index: int) -> str:
    """What the file of a found plan is called."""
    return f"plan-{index + 1}.toml"
