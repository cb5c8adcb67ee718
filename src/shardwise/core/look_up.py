"""LookUps: what the table of token ids costs alone, forward, backward and optimizer, under each style, over
tensor-parallel ranks and sizes of a batch. Standard library."""

from dataclasses import dataclass

from shardwise.core.case import StepSettings
from shardwise.core.prediction import Setup, Term
from shardwise.core.prediction_run import MachineFacts
from shardwise.core.sweep import Refusal

TIE = 0.05
"""Plans whose times differ by less are as good as one another here: about what predictions of a step are off
by at the median (docs/predict-accuracy.md)."""


@dataclass(frozen=True, slots=True)
class LookUpPoint:
    """One plan's table on tp ranks, for a batch of so many sequences. step_s: predicted, adding up terms.
    sent_bytes: by the busiest rank in a step. held_bytes: of a rank between steps: its part, its gradient,
    the optimizer's state. peak_bytes: the most in a step, with what comes and goes."""

    plan: str
    tp: int
    batch: int
    step_s: float
    terms: tuple[tuple[Term, float], ...]
    sent_bytes: float
    held_bytes: int
    peak_bytes: float

    @property
    def host_s(self) -> float:
        """Of the step, what the device waits for the host: nothing where the host runs ahead of a long
        step."""
        return dict(self.terms).get(Term.LAUNCH, 0.0)


@dataclass(frozen=True, slots=True)
class Place:
    """Ranks and a batch's sequences, what each plan takes there (fastest first), and those that are as good
    as the fastest."""

    tp: int
    batch: int
    points: tuple[LookUpPoint, ...]

    @property
    def best(self) -> tuple[LookUpPoint, ...]:
        least = self.points[0].step_s
        return tuple(point for point in self.points if point.step_s <= least * (1 + TIE))


@dataclass(frozen=True, slots=True)
class LookUps:
    """vocab, hidden: of the table. is_tied: the head is the same matrix, which a plan must cut for both.
    text: whose token ids were looked up. refused: points that can't be, by reason."""

    model: str
    vocab: int
    hidden: int
    is_tied: bool
    machine: MachineFacts
    settings: StepSettings
    setup: Setup
    text: str
    points: tuple[LookUpPoint, ...]
    refused: tuple[Refusal, ...]
    schema_version: int = 1

    @property
    def plans(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.plan for point in self.points))

    @property
    def places(self) -> tuple[Place, ...]:
        """By batch, then by ranks."""
        found: dict[tuple[int, int], list[LookUpPoint]] = {}
        for point in self.points:
            found.setdefault((point.batch, point.tp), []).append(point)
        return tuple(
            Place(tp, batch, tuple(sorted(points, key=lambda point: point.step_s)))
            for (batch, tp), points in sorted(found.items())
        )
