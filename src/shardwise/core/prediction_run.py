"""PredictionRun: what one `shardwise predict` found: plans on one machine, the first being what the others
are held against. Standard library."""

from dataclasses import dataclass

from shardwise.core.case import StepSettings
from shardwise.core.machine import Constant, Spread
from shardwise.core.prediction import Prediction, Term

LAUNCH_BOUND = 0.05
"""From this share of the step on, waiting for launches is flagged: it is what compiling or CUDA graphs could
win."""


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What a reader of a prediction needs to know of its machine. constants: all of its numbers as written,
    with their sources. spread: of its ranks; None where it doesn't say."""

    name: str
    about: str
    device: str
    devices_per_node: int
    memory_bytes: float
    constants: tuple[Constant, ...]
    spread: Spread | None = None

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """Each source with the number of constants that are from it, those with most first."""
        counts: dict[str, int] = {}
        for constant in self.constants:
            counts[constant.source] = counts.get(constant.source, 0) + 1
        return tuple(sorted(counts.items(), key=lambda pair: -pair[1]))


@dataclass(frozen=True, slots=True)
class LaunchBound:
    """A kind of module whose device waits for the host to issue its work: seconds of a micro-batch (or of the
    step's end) in one phase."""

    module: str
    phase: str
    waits_s: float


@dataclass(frozen=True, slots=True)
class PlanDifference:
    """A plan against the first. ratio: its step over the first's. term: the one whose seconds differ most, by
    term_s (more is slower)."""

    plan: str
    ratio: float
    term: Term
    term_s: float


@dataclass(frozen=True, slots=True)
class PredictionRun:
    """settings: of the whole step, its batch over all ranks. launch_bound: of each prediction, largest
    first."""

    machine: MachineFacts
    settings: StepSettings
    predictions: tuple[Prediction, ...]
    differences: tuple[PlanDifference, ...] = ()
    launch_bound: tuple[tuple[LaunchBound, ...], ...] = ()
    schema_version: int = 1

    @property
    def fits(self) -> bool:
        """Whether every plan fits in the machine's memory."""
        return all(prediction.memory.fits for prediction in self.predictions)
