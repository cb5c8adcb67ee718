"""Why a sharded model isn't the unsharded one: from how the ranks' pieces relate to the whole, to a sentence
with the rule.

A difference is passed on: in the forward to every later module, in the backward to every earlier one. So each
wrong gradient is asked for itself first (does its own relation name a fault?), then whether the gradient that
came to its module, or the module's output, was wrong before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.parallel.apply import applied_to
from shardwise.verify.along import Along
from shardwise.verify.expected import Differences
from shardwise.verify.relation import Related, Relation


@dataclass(frozen=True, slots=True)
class Seen:
    """A module's call: how its output on the ranks, and the gradient that came back to it, relate to the
    unsharded ones. None: it has none."""

    module: str
    output: Related | None
    gradient: Related | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of a wrong run. output: of the logits, if they are wrong. gradients: of the
    parameters whose gradients are wrong.

    seen: calls in the order in which they ended; empty where the sharded model's calls aren't the unsharded
    one's. recut: what a trial found. along: gradients that lack a sum over axes of the mesh.
    """

    model: nn.Module
    n_ranks: int
    differences: Differences
    output: Related | None
    gradients: dict[str, Related]
    seen: Sequence[Seen] = ()
    recut: "Recut | None" = None
    along: Mapping[str, Along] = field(default_factory=dict)

    @property
    def first_wrong_output(self) -> Seen | None:
        return next((call for call in self.seen if _is_wrong(call.output)), None)


@dataclass(frozen=True, slots=True)
class Recut:
    """A parameter that makes its module right when it is cut in another way. parts: as so many tensors, each
    by itself; 1: as one."""

    parameter: str
    parts: int

    @property
    def reason(self) -> str:
        if self.parts == 1:
            how, other = (
                "it is one weight, and it is cut as if several lay in it, each by itself",
                "cut as one",
            )
        else:
            how = f"{self.parts} weights lie in it, and it is cut as if it were one"
            other = "with each cut by itself"
        return f"{how}; {other}, its module is right"


ADVICE = {
    Cause.PARTS_NOT_SUMMED: "Sum them over tp; of a gradient, sequence_parallel does that, and "
    "replicated_with_grad_allreduce in a plan of transformers.",
    Cause.SUMMED_TOO_OFTEN: "Leave out the sum; or, where the style takes its input for a part, such as of "
    "the sequence, give it one.",
    Cause.AVERAGED: "Sum the parts instead of averaging them, and don't divide a whole.",
    Cause.CUT_AS_ONE: "Cut each weight by itself; in a plan of transformers, packed_colwise and "
    "packed_rowwise do that.",
    Cause.NOT_GATHERED: "Gather the logits (colwise_gather_output in a plan of transformers), or take a "
    "vocabulary-parallel loss.",
    Cause.WRONG_SHARD: "Let rank r hold the r-th chunk, as DTensor's Shard does.",
}


def explain_differences(evidence: Evidence) -> list[Finding]:
    """A finding for the output or loss if they differ, and one for each wrong gradient: faults first, then
    what follows from them."""
    differences, forward = evidence.differences, evidence.first_wrong_output
    findings: list[Finding] = []
    if differences.is_output_wrong:
        findings.append(_output_finding(evidence, forward))
    elif differences.is_loss_wrong:
        reason = "the outputs are right and the loss isn't"
        findings.append(Finding(FindingKind.LOSS_DIFFERS, "loss", reason, differences.loss))
    backward = _last_wrong_gradient(evidence)
    of_gradients = [_gradient_finding(evidence, name, forward, backward) for name in evidence.gradients]
    of_gradients.sort(key=lambda finding: finding.cause is Cause.FOLLOWS or finding.cause is Cause.FORWARD)
    return findings + of_gradients


def with_ties(findings: Iterable[Finding], untied: Iterable[Finding]) -> list[Finding]:
    """The gradient of a parameter that was torn apart is wrong for that reason."""
    reasons = {finding.subject: finding.reason for finding in untied if finding.kind is FindingKind.UNTIED}
    return [
        replace(finding, cause=Cause.UNTIED, reason=reasons[finding.subject])
        if finding.subject in reasons and finding.cause is Cause.UNKNOWN
        else finding
        for finding in findings
    ]


def is_unexplained(finding: Finding) -> bool:
    """Whether the numbers of a proof leave open why it is wrong: of a gradient, or of the module that is the
    first to give another output."""
    return finding.cause is Cause.UNKNOWN or (
        finding.kind is FindingKind.OUTPUT_DIFFERS and finding.cause is Cause.FORWARD
    )


def with_suspicions(
    findings: Sequence[Finding], suspicions: Iterable[Finding], *, add: bool = False
) -> list[Finding]:
    """What a trace suspects, as the reason of what is wrong and has none. add: where nothing was proved,
    suspicions of anything else too."""
    by_name = {each.subject: each for each in suspicions if each.kind is not FindingKind.CRASHES}
    wrong = {finding.subject for finding in findings}
    cuts = (each for each in by_name.values() if each.cause is Cause.CUT_AS_ONE)
    cut = next((each for each in cuts if each.subject in wrong), None)
    informed = []
    for finding in findings:
        own = by_name.get(finding.subject)
        is_own = finding.cause is Cause.UNKNOWN or (finding.cause is Cause.FORWARD and own is cut)
        if cut is not None and finding.kind is FindingKind.OUTPUT_DIFFERS and is_unexplained(finding):
            reason = f"{finding.reason}. {cut.subject}: {cut.reason}"
            finding = replace(finding, cause=cut.cause, reason=reason, advice=cut.advice)
        elif own is not None and is_own:
            finding = replace(finding, cause=own.cause, reason=own.reason, advice=own.advice)
        informed.append(finding)
    return informed + [each for name, each in by_name.items() if add and name not in wrong]


def ungathered(reason: str) -> tuple[Finding, ...]:
    """Logits that no loss could be taken of."""
    cause = Cause.NOT_GATHERED
    return (Finding(FindingKind.OUTPUT_DIFFERS, "output", reason, advice=ADVICE[cause], cause=cause),)


# --------------------------------------------------------------------------------- where it goes wrong


_WRONG = frozenset({Relation.MULTIPLE, Relation.UNEQUAL, Relation.ZERO, Relation.SHIFTED})


def _is_wrong(related: Related | None) -> bool:
    """Whether an activation can't be right. What lies cut in an order of its own, as heads or experts do,
    isn't known to be wrong."""
    if related is None:
        return False
    is_comparable = related.dim is None and related.error < float("inf")
    return related.relation in _WRONG or (related.relation is Relation.OTHER and is_comparable)


def _last_wrong_gradient(evidence: Evidence) -> int | None:
    """The call nearest to the loss whose gradient is wrong."""
    return max((at for at, call in enumerate(evidence.seen) if _is_wrong(call.gradient)), default=None)


def _output_finding(evidence: Evidence, forward: Seen | None) -> Finding:
    related = evidence.output
    if related is not None and related.relation is Relation.SHARDED:
        cause = Cause.NOT_GATHERED
        reason = f"each rank has 1/{evidence.n_ranks} of the logits, and the loss takes them for all"
    elif forward is None:
        cause, reason = Cause.UNKNOWN, "the outputs aren't the unsharded model's"
    else:
        cause, reason = _forward_fault(evidence, forward)
    rule = applied_to(evidence.model).rule_for(forward.module) if forward is not None else None
    error, advice = evidence.differences.output, ADVICE.get(cause)
    return Finding(FindingKind.OUTPUT_DIFFERS, "output", reason, error, advice=advice, cause=cause, rule=rule)


def _forward_fault(evidence: Evidence, forward: Seen) -> tuple[Cause, str]:
    """Of the first module whose output can't be right, or of what it was given."""
    words = _words(forward.output, _OUTPUT_WORDS, "its output")
    reason = f"the first module whose output differs is {_named(forward.module)}: {words}"
    if evidence.recut is not None:
        return Cause.CUT_AS_ONE, f"{reason}. {evidence.recut.parameter}: {evidence.recut.reason}"
    parts = _parts_before(evidence, forward)
    if parts is not None:
        sums = f"{parts} gives each rank a part of a sum, and nothing sums them"
        return Cause.PARTS_NOT_SUMMED, f"{sums}; {reason}"
    assert forward.output is not None
    match forward.output.relation:
        case Relation.SHIFTED:
            return Cause.WRONG_SHARD, reason
        case Relation.MULTIPLE if abs(forward.output.factor or 0.0) > 1:
            return Cause.SUMMED_TOO_OFTEN, reason
        case Relation.MULTIPLE:
            return Cause.AVERAGED, reason
        case _:
            return Cause.FORWARD, reason


def _parts_before(evidence: Evidence, forward: Seen) -> str | None:
    """The module whose output, the last before the first wrong one, is a part on each rank; the innermost
    where modules hand it on."""
    parts = None
    for call in reversed(evidence.seen[: evidence.seen.index(forward)]):
        if call.output is not None:
            if call.output.relation is not Relation.PARTS:
                break
            parts = call.module
    return parts


# ------------------------------------------------------------------------------------- each gradient


def _gradient_finding(evidence: Evidence, name: str, forward: Seen | None, backward: int | None) -> Finding:
    related, error = evidence.gradients[name], evidence.differences.wrong_gradients[name]
    is_missing = related.relation is Relation.MISSING
    cause, reason = _own_fault(related, evidence.n_ranks)
    if evidence.recut is not None and evidence.recut.parameter == name:
        cause, reason, is_missing = Cause.CUT_AS_ONE, evidence.recut.reason, False
    elif name in evidence.along and (
        evidence.along[name].relation is Relation.PARTS or cause is Cause.UNKNOWN
    ):  # what is shifted over tp may look so over another axis that cuts the same dim
        return _finding_along(evidence, name)
    elif cause in (Cause.UNKNOWN, Cause.SUMMED_TOO_OFTEN, Cause.AVERAGED):
        cause, reason = _passed_on(evidence, name, forward, backward) or (cause, reason)
    kind = FindingKind.GRADIENT_MISSING if is_missing else FindingKind.GRADIENT_DIFFERS
    rule = applied_to(evidence.model).rule_for(name)
    return Finding(kind, name, reason, error, related.factor, ADVICE.get(cause), cause, rule)


def _finding_along(evidence: Evidence, name: str) -> Finding:
    """Of a gradient that lacks its sum over axes of the mesh, or lies wrongly along one."""
    along, error = evidence.along[name], evidence.differences.wrong_gradients[name]
    cause, reason = (
        Cause.PARTS_NOT_SUMMED,
        (
            f"each of {along.n_ranks} ranks along {along.named} computes a part of its gradient, and nothing "
            f"sums them over {along.named}"
        ),
    )
    over_tp = along.axes == (TENSOR_AXIS,)
    advice = ADVICE[cause] if over_tp else f"Sum them over {along.named}, as a training step sums the others."
    match along.relation:
        case Relation.SHIFTED:
            cause, reason = Cause.WRONG_SHARD, f"along {along.named} {_SHIFTED}"
            advice = ADVICE[cause]
        case Relation.ADDED:
            cause, reason = Cause.SUMMED_TOO_OFTEN, f"along {along.named} {_ADDED}"
            advice = f"Don't sum over {along.named} what its ranks hold each for itself."
        case _:
            pass
    rule = applied_to(evidence.model).rule_for(name)
    return Finding(FindingKind.GRADIENT_DIFFERS, name, reason, error, None, advice, cause, rule)


_SHIFTED = "each rank has the gradient of another rank's part"
_ADDED = "every rank has the sum of all ranks' gradients, each of a part of its own"


def _own_fault(related: Related, n_ranks: int) -> tuple[Cause, str]:
    times = f"{_times(related.factor)} the unsharded one"
    match related.relation:
        case Relation.MISSING:
            return Cause.NOTHING_ARRIVES, "no gradient arrives on some rank"
        case Relation.ZERO:
            return Cause.NOTHING_ARRIVES, "its gradient is zero, and the unsharded one isn't"
        case Relation.PARTS if related.factor is None:
            reason = f"each of {n_ranks} ranks computes a part of its gradient, and nothing sums them"
            return Cause.PARTS_NOT_SUMMED, reason
        case Relation.PARTS:
            reason = f"the ranks' gradients differ, nothing sums them, and their sum is {times}"
            return Cause.PARTS_NOT_SUMMED, reason
        case Relation.MULTIPLE if related.factor is not None and abs(related.factor) > 1:
            return Cause.SUMMED_TOO_OFTEN, f"its gradient is {times}: summed where every rank had the whole"
        case Relation.MULTIPLE:
            return Cause.AVERAGED, f"its gradient is {times}: averaged, or parts that were not summed"
        case Relation.SHIFTED:
            return Cause.WRONG_SHARD, _SHIFTED
        case Relation.ADDED:
            return Cause.SUMMED_TOO_OFTEN, _ADDED
        case Relation.ONE_OF_SEVERAL:
            reason = (
                f"it holds {related.factor:.0f} weights, which must each be cut by itself; it is cut as one"
            )
            return Cause.CUT_AS_ONE, reason
        case Relation.SHARDED | Relation.WHOLE:
            reason = "each rank's gradient is right for a plain cut, and the parameter isn't cut so"
            return Cause.CUT_AS_ONE, reason
        case Relation.UNEQUAL:
            return Cause.UNKNOWN, "every rank holds it whole, and its gradient isn't equal on them"
        case _:
            return Cause.UNKNOWN, "its gradient isn't the unsharded one"


def _passed_on(
    evidence: Evidence, name: str, forward: Seen | None, backward: int | None
) -> tuple[Cause, str] | None:
    """Where what came to the parameter's module was wrong already."""
    if forward is not None and evidence.differences.is_output_wrong:
        where = _named(forward.module)
        return Cause.FORWARD, f"the forward is wrong from {where} on, and so is what comes back"
    module = name.rpartition(".")[0]
    own = next((at for at, call in enumerate(evidence.seen) if call.module == module), None)
    if own is None or backward is None or own >= backward:
        return None
    source = evidence.seen[backward]
    where, words = _named(source.module), _words(source.gradient, _GRADIENT_WORDS, "there it")
    return Cause.FOLLOWS, f"the gradient that comes down to it is wrong from {where} on: {words}"


def _named(module: str) -> str:
    return module or "the model itself"


_OUTPUT_WORDS = {
    Relation.UNEQUAL: "its output isn't equal on all ranks",
    Relation.ZERO: "its output is zero",
    Relation.SHIFTED: "each rank has another rank's part",
}
_GRADIENT_WORDS = {
    Relation.UNEQUAL: "there it isn't equal on all ranks, nor a part of a sum",
    Relation.ZERO: "there it is zero",
}


def _words(related: Related | None, by_relation: Mapping[Relation, str], what: str) -> str:
    if related is None:
        return f"{what} isn't the unsharded one"
    if related.relation is Relation.MULTIPLE:
        return f"{what} is {_times(related.factor)} the unsharded one"
    return by_relation.get(related.relation, f"{what} isn't the unsharded one")


def _times(factor: float | None) -> str:
    if factor is None:
        return "a multiple of"
    for n in range(2, 65):
        if abs(factor - n) < 1e-6:
            return f"{n} times"
        if abs(factor - 1 / n) < 1e-6:
            return f"1/{n} of"
    return f"{factor:.3g} times"
