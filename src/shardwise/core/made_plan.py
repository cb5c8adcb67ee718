"""MadePlan: a plan that was made from a model's Dims, with a reason for each rule and for what stays
whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardwise.core.dims import Dims
from shardwise.core.plan import Plan


@dataclass(frozen=True, slots=True)
class LeftWhole:
    """A parameter (a pattern of equal ones) that every rank holds whole, and why."""

    pattern: str
    elements: int
    reason: str


@dataclass(frozen=True, slots=True)
class CutAlone:
    """A module (a pattern of equal ones) whose parameters are cut by themselves, and what it gives gathered:
    elements of all, and why no other cut takes it in."""

    pattern: str
    elements: int
    reason: str


@dataclass(frozen=True, slots=True)
class MadePlan:
    """plan: what `verify`, `compare` and the rest take. comments: pattern of a rule -> why. dims: the model's
    classes; those with is_cut are what the plan cuts, and beside them what is cut alone. sharded: share of
    the model's parameters of which a rank holds its part alone. sequence: where the sequence is cut, in
    words; why_not: why it isn't."""

    model: str
    mesh: str
    plan: Plan
    comments: Mapping[str, str]
    dims: Dims
    whole: tuple[LeftWhole, ...]
    parameters: int
    sharded: float
    sequence: str | None = None
    why_not: str | None = None
    notes: tuple[str, ...] = field(default=())
    alone: tuple[CutAlone, ...] = field(default=())
    schema_version: int = 1

    def to_toml(self) -> str:
        """The plan as a file's text, each rule under the sentence that says why."""
        return self.plan.to_toml(comments=self.comments)
