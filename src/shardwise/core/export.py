"""Export: a plan written for a framework, what of it the framework's format can't say, and what that costs.
Standard library only."""

from dataclasses import dataclass, field

from shardwise.core.prediction import Term


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a format can't say. asked: a rule, an axis or a setting, as it was asked for. instead: what the
    files say in its place. why: a sentence."""

    asked: str
    instead: str
    why: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What it costs to leave out what a format can't say: predict's step and memory of the plan as it was
    asked for, and of the plan that the files say. terms: in which their seconds differ, the largest first
    (more is slower)."""

    machine: str
    asked_s: float
    said_s: float
    asked_bytes: float
    said_bytes: float
    fits: bool
    terms: tuple[tuple[Term, float], ...]

    @property
    def ratio(self) -> float:
        """The step of what is said over that of what was asked for."""
        return self.said_s / self.asked_s


@dataclass(frozen=True, slots=True)
class File:
    """name: in the folder that is asked for."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Export:
    """command: that makes it again. said: the plan that the files say, as a file of ours, where it isn't the
    one that was asked for. cost: None where nothing is left out, or where nobody can tell (why_no_cost).
    prove: the command that proves what was written, where one can."""

    model: str
    plan: str
    mesh: str
    format: str
    about: str
    command: str
    files: tuple[File, ...]
    left_out: tuple[LeftOut, ...] = ()
    said: str | None = None
    cost: Cost | None = None
    why_no_cost: str | None = None
    prove: str | None = None
    notes: tuple[str, ...] = field(default=())
    schema_version: int = 1
