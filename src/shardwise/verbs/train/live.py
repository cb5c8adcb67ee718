"""A step of a run as it is told while the run goes on."""

from dataclasses import dataclass

from shardwise.core.training import StepRecord


@dataclass(frozen=True, slots=True)
class Live:
    """A step as it is told while the run goes on. predicted_s: a step's; mfu: the share of the machine's peak
    that the model's work was (see Forecast); None where they aren't known."""

    record: StepRecord
    steps: int
    predicted_s: float | None = None
    mfu: float | None = None
