"""A predicted step beside a measured one: what each term was predicted at and what it took, and the work
behind it. Nouns and their arithmetic; predict/step.py and profiles/beside.py fill them.

All times are nanoseconds per step of one rank. Each instant of a measured step is booked on one line, and so
is each of a predicted one:

    sum of the lines = sum of the terms = step, on both sides

None: a side knows nothing of such a term, which is not 0.
"""

from dataclasses import dataclass
from enum import StrEnum

from shardwise.core.case import StepSettings
from shardwise.core.difference import RunProfile, Use
from shardwise.core.parts import Parts
from shardwise.core.prediction import COMPUTE_TERMS, EXCHANGE_TERMS, Term

IDLE = "idle, the next work launched"
FURTHER = "communication that wasn't predicted"
MEASURED_ALONE = (IDLE, FURTHER)
"""What a measured step has that no Term stands for."""
_LONGEST_NS = 1e18
"""Thirty years: no step takes longer."""
MOST_SHAPES = 160
"""Characters of shapes by which work is told apart: an optimizer's op takes all parameters."""


class LineKind(StrEnum):
    """What a line is of: work of the device, an exchange with other ranks, or what the host takes to issue
    either (and what it does between)."""

    WORK = "work"
    EXCHANGE = "exchange"
    ISSUING = "issuing"


@dataclass(frozen=True, slots=True)
class PredictedLine:
    """Predicted work of equal layers. step_pass: forward, backward or end. op: of work as the dispatcher
    names it; of an exchange its kind. shapes: of the tensors that went in, "[4,256] [256,64]". use: how
    often, and what of it the step waits for; own_ns: hidden or not."""

    kind: LineKind
    term: str
    step_pass: str
    module: str
    op: str
    shapes: str
    use: Use
    own_ns: float


@dataclass(frozen=True, slots=True)
class PredictedStep:
    """A predicted step, line by line. axes: of the mesh. together: host and device are one, a CPU: what
    issuing takes is apart from the ops all the same. terms: adding up to step_ns; one that nothing is
    known of is left out. device: what it was traced for."""

    label: str
    model: str
    plan: str
    machine: str
    device: str
    axes: tuple[tuple[str, int], ...]
    settings: StepSettings
    together: bool
    terms: tuple[tuple[str, float], ...]
    lines: tuple[PredictedLine, ...]
    notes: tuple[str, ...] = ()
    schema_version: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError where no step can be so."""
        is_known = all(abs(line.own_ns) <= _LONGEST_NS for line in self.lines)
        is_real = all(-1 < ns <= _LONGEST_NS for _, ns in self.terms)  # rounding leaves less than nothing
        if not is_known or not is_real or not self.step_ns > 0:
            raise ValueError("its times aren't those of a step: 0 or more, and above 0 together")
        if not all(size >= 1 for _, size in self.axes):
            raise ValueError("its mesh has an axis of less than one rank")

    @property
    def step_ns(self) -> float:
        return sum(ns for _, ns in self.terms)

    @property
    def parts(self) -> Parts:
        """As core/decomposition.py cuts a measured one. Where host and device are one, nothing is launched,
        so issuing is idle time of no known cause, as in a profile."""
        terms = dict(self.terms)
        bubble, launch = terms.get(Term.BUBBLE, 0.0), terms.get(Term.LAUNCH, 0.0)
        exchanges, works = (*EXCHANGE_TERMS, Term.DATA), (*COMPUTE_TERMS, Term.SLOWED)
        exchanged, compute, waiting = (
            sum(terms.get(term, 0.0) for term in chosen) for chosen in (exchanges, works, (Term.WAITING,))
        )
        idle = (0.0, launch + bubble) if self.together else (launch, bubble)
        return Parts(compute, exchanged, 0.0, waiting, 0.0, *idle)


class Found(StrEnum):
    """By what a line's predicted and measured work are known to be the same."""

    SHAPES = "by module, op and shapes"
    MODULE = "by module and op"
    OP_SHAPES = "by op and shapes"
    OP = "by op"
    PREDICTED = "predicted alone"
    MEASURED = "measured alone"


@dataclass(frozen=True, slots=True)
class BesideLine:
    """The same work on both sides. names: of the kernels, or of the CPU's ops, behind what was measured."""

    kind: LineKind
    term: str
    step_pass: str
    module: str
    op: str
    shapes: str
    found: Found
    predicted: Use
    measured: Use
    names: tuple[str, ...] = ()

    @property
    def delta_ns(self) -> float:
        """Above 0: predicted too slow."""
        return self.predicted.ns - self.measured.ns


@dataclass(frozen=True, slots=True)
class TermLine:
    """One term on both sides. alike: where lines of it are off by nearly one factor, that factor, which says
    that one constant is wrong; else None."""

    term: str
    predicted_ns: float | None
    measured_ns: float | None
    alike: float | None = None

    @property
    def delta_ns(self) -> float:
        """Above 0: predicted too slow."""
        return (self.predicted_ns or 0.0) - (self.measured_ns or 0.0)


@dataclass(frozen=True, slots=True)
class Beside:
    """terms: in the prediction's order, then what only a measurement has. lines: those that are off most
    first. unsplit_ns: of the measured exchanges, those of which waiting can't be told apart. verdict: in
    words."""

    predicted: PredictedStep
    measured: RunProfile
    terms: tuple[TermLine, ...]
    lines: tuple[BesideLine, ...]
    unsplit_ns: float = 0.0
    verdict: tuple[str, ...] = ()
    schema_version: int = 1

    @property
    def error(self) -> float | None:
        """Signed, of the step: below 0 where it was predicted too fast."""
        measured = self.measured.step_ns
        return self.predicted.step_ns / measured - 1 if measured > 0 else None

    @property
    def matched(self) -> float:
        """Of what the measured step works and exchanges, the share that has a predicted line."""
        by = self.by_found()
        whole = sum(by.values())
        return 1 - by[Found.MEASURED] / whole if whole else 0.0

    def by_found(self) -> dict[Found, float]:
        """Nanoseconds of what the measured step works and exchanges, by what its line was found by."""
        by = dict.fromkeys(Found, 0.0)
        for line in self.lines:
            if line.kind is not LineKind.ISSUING and line.term not in (Term.WAITING, IDLE):
                by[line.found] += line.measured.ns
        return by

    @property
    def off_ns(self) -> float:
        """What the terms are off by, all of them, whichever way."""
        return sum(abs(each.delta_ns) for each in self.terms)


@dataclass(frozen=True, slots=True)
class BesideRun:
    """Predictions beside measurements of several plans of one run."""

    plans: tuple[Beside, ...]
    schema_version: int = 1
