"""Finding: one reason why a plan is not right, with the numbers that show it."""

from dataclasses import dataclass
from enum import StrEnum


class FindingKind(StrEnum):
    LOSS_DIFFERS = "loss_differs"
    GRADIENT_DIFFERS = "gradient_differs"
    GRADIENT_MISSING = "gradient_missing"
    RANKS_DISAGREE = "ranks_disagree"
    GRADIENT_NOT_AS_PARAMETER = "gradient_not_as_parameter"
    PARTIAL_GRADIENT = "partial_gradient"
    RULE_MATCHES_NOTHING = "rule_matches_nothing"
    LITTLE_IS_SHARDED = "little_is_sharded"
    COPIES_FOR_COLLECTIVES = "copies_for_collectives"
    COLLECTIVES_REPEAT = "collectives_repeat"
    COLLECTIVES_CANCEL = "collectives_cancel"
    OPS_UNKNOWN = "ops_unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject`: the parameter (or "loss", "ids") that is wrong. `reason`: one sentence for people.

    relative_error: ||sharded - unsharded|| / ||unsharded|| (None where the finding isn't about a size).
    ratio: least-squares factor between them, <s,u>/<u,u>: 2.0 or 1/tp tells its own story. advice: what to do, a sentence.
    """

    kind: FindingKind
    subject: str
    reason: str
    relative_error: float | None = None
    ratio: float | None = None
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a sharded model agrees with the unsharded one: worst relative error over the loss and every gradient.

    `layers` is the depth of the model that was compared; it is smaller than the model's where the unsharded one would not fit.
    """

    plan: str
    dtype: str
    layers: int
    parameters_compared: int
    loss_error: float
    worst_gradient: str
    worst_gradient_error: float
    tolerance: float
    findings: tuple[Finding, ...] = ()

    @property
    def agrees(self) -> bool:
        return not self.findings
