"""Predictions side by side: each further plan against the first, and the term that makes the most
difference."""

from collections.abc import Sequence

from shardwise.core.machine import Machine
from shardwise.core.prediction import Prediction, Term
from shardwise.core.prediction_run import MachineFacts, PlanDifference


def differences(predictions: Sequence[Prediction]) -> tuple[PlanDifference, ...]:
    """One for each prediction after the first."""
    first, *others = predictions
    return tuple(_difference(first, other) for other in others)


def _difference(first: Prediction, other: Prediction) -> PlanDifference:
    base, terms = dict(first.terms), dict(other.terms)
    by_term = {term: terms.get(term, 0.0) - base.get(term, 0.0) for term in Term}
    largest = max(by_term, key=lambda term: abs(by_term[term]))
    return PlanDifference(
        other.plan, other.step_s / first.step_s if first.step_s else 1.0, largest, by_term[largest]
    )


def facts_of(machine: Machine) -> MachineFacts:
    """What a reader needs of the machine."""
    return MachineFacts(
        machine.name,
        machine.about,
        machine.device,
        machine.devices_per_node,
        machine.memory_bytes,
        machine.constants,
        machine.spread,
    )
