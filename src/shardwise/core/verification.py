"""Verification: what a proof of one plan on one model found, or why there is none."""

from dataclasses import dataclass, fields
from enum import StrEnum

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.sharded import Sharded


class Verdict(StrEnum):
    RIGHT = (
        "right"  # outputs, loss, every gradient, and the weights after two steps are the unsharded model's
    )
    WRONG = "wrong"  # something of these isn't
    NEARLY_NOTHING = "shards nearly nothing"  # right, because there is little that could be wrong
    CRASHES = "crashes"  # under the plan it doesn't run, on some rank at least
    TIMED_OUT = "timed out"  # nothing was heard of it for the time that it was given
    SUSPECTED = "suspected"  # nothing ran, and a static check says that it would be wrong or crash
    NOT_PROVED = "not proved"  # nothing ran, and the static checks found nothing
    SKIPPED = "skipped"  # not even the unsharded model runs, or there is no plan: nothing was proved

    @property
    def is_no(self) -> bool:
        """Whether the answer to "does this plan train the right model" is no."""
        return self not in (Verdict.RIGHT, Verdict.NOT_PROVED, Verdict.SKIPPED)


@dataclass(frozen=True, slots=True)
class Proof:
    """The numbers of a proof; errors are relative. noise: what summing each matmul in tp parts does to the
    unsharded model.

    worst_gradient_error: of a gradient that is right, the rounding in it counts by its share of what is
    allowed, so it is within the tolerance. weights_error: the largest over all parameters after `steps`
    optimizer steps with clipping; None where the gradients differ already. otherwise: what of the model ran
    otherwise than it is written. without_gradient: of the parameters compared those that have no gradient
    unsharded or sharded, of which the proof says nothing else.
    """

    dtype: str
    noise: float
    tolerance: float
    output_error: float
    loss_error: float
    parameters_compared: int
    worst_gradient: str
    worst_gradient_error: float
    steps: int
    norm_error: float | None
    weights_error: float | None
    otherwise: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """The numbers of a proof as `compare` makes it of a plan before it is timed: without the optimizer's
    steps.

    layers: the depth of the model that was proved; smaller than the model's where the unsharded one would not
    fit, 0 where nobody can count its layers. output_error, noise: as a Proof has them; None in documents of
    before.
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
    output_error: float | None = None
    noise: float | None = None

    @classmethod
    def of(cls, proof: Proof, findings: tuple[Finding, ...], *, plan: str, layers: int) -> "Agreement":
        names = {each.name for each in fields(cls)} & {each.name for each in fields(proof)}
        numbers = {name: getattr(proof, name) for name in names}
        return cls(**numbers, plan=plan, layers=layers, findings=findings)

    @property
    def agrees(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class Verification:
    """One model under one plan. model: as named. twin: what was run instead, if it isn't the model itself.
    note: why it was skipped or crashed.

    is_static: nothing was run, and the findings are those of the static checks. ran_unsharded: of a crash,
    whether the rank that it was on is known to have come through the unsharded run.
    """

    model: str
    plan: str
    tp: int
    twin: str = ""
    parameters: int | None = None
    sharded: Sharded | None = None
    proof: Proof | None = None
    findings: tuple[Finding, ...] = ()
    note: str = ""
    seconds: float = 0.0
    is_static: bool = False
    ran_unsharded: bool = True

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that say no."""
        return tuple(finding for finding in self.findings if finding.kind not in _NO_FAULT)

    @property
    def verdict(self) -> Verdict:
        kinds = {finding.kind for finding in self.findings}
        if self.is_static and self.wrong:
            return Verdict.SUSPECTED
        if FindingKind.TIMED_OUT in kinds:
            return Verdict.TIMED_OUT
        if FindingKind.CRASHES in kinds:
            return Verdict.CRASHES
        if self.wrong:
            return Verdict.WRONG
        if FindingKind.LITTLE_IS_SHARDED in kinds:
            return Verdict.NEARLY_NOTHING
        if self.is_static and self.sharded is not None:
            return Verdict.NOT_PROVED
        return Verdict.RIGHT if self.proof is not None else Verdict.SKIPPED


# said, and no reason to call a plan wrong
_NO_FAULT = frozenset(
    {
        FindingKind.LITTLE_IS_SHARDED,
        FindingKind.RULE_MATCHES_NOTHING,
        FindingKind.RULE_IS_SHADOWED,
        FindingKind.DROPOUT_MAY_DIFFER,
        FindingKind.CLIPPING_RAISES,
    }
)


@dataclass(frozen=True, slots=True)
class VerificationRun:
    """All cases of one command: what they share, and what was found of each. smallest_batch: that they were
    compared on too."""

    mesh: str
    device: str
    batch: int
    seq: int
    started: str
    versions: tuple[tuple[str, str], ...]
    verifications: tuple[Verification, ...]
    smallest_batch: int | None = None
    schema_version: int = 1

    @property
    def is_no(self) -> bool:
        return any(each.verdict.is_no for each in self.verifications)
