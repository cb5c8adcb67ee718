"""Why gradients are wrong: what each tells by itself, and where it comes from. Of those that come from one
place the one that is nearest to the loss stands first, with the reason, and the others follow from it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.parallel.apply import applied_to
from shardwise.verify.evidence import Evidence
from shardwise.verify.relation import Relation
from shardwise.verify.roots import Judgement, Source, judged
from shardwise.verify.trail import Side
from shardwise.verify.words import ADDED, ADVICE, SHIFTED, around, listed, named, own_fault, spot
from shardwise.verify.wrong_output import place_of_first

_PASSED_ON = frozenset({Cause.UNKNOWN, Cause.SUMMED_TOO_OFTEN, Cause.AVERAGED})


def gradient_findings(evidence: Evidence, before: Finding | None) -> list[Finding]:
    """before: of the output or the loss, which explains what comes back wrong to all of the model."""
    own = {name: _own_finding(evidence, name) for name in evidence.gradients}
    if evidence.differences.is_output_wrong:
        return _after_the_forward(evidence, own.values())
    sources = {name: evidence.roots.source(name, related) for name, related in evidence.gradients.items()}
    by_key: dict[object, list[str]] = {}
    for name in sorted(own, key=evidence.roots.arrival):
        key = _key(evidence, name, own[name], sources[name])
        by_key.setdefault(_known_as(key, sources[name], by_key), []).append(name)
    order = {name: at for at, name in enumerate(own)}
    groups = list(by_key.items())
    # what explains the most is told first; of what explains nothing else the model's own order
    groups.sort(key=lambda group: (len(group[1]) == 1, len(group[1]) == 1 and order[group[1][0]]))
    found: list[Finding] = []
    for key, names in groups:
        if key == _LOSS and before is not None:
            reason = "the gradient of the outputs is wrong already"
            found += [_passed_on(own[name], reason, before.subject) for name in names]
        else:
            found += _of_one_source(evidence, [own[name] for name in names], sources[names[0]])
    return found


_LOSS = "loss"


def _after_the_forward(evidence: Evidence, own: Iterable[Finding]) -> list[Finding]:
    """Where the output is wrong: what its first fault explains, after what has a fault of its own."""
    reason = f"the forward is wrong from {place_of_first(evidence)} on, and so is what comes back"
    findings = [
        replace(_passed_on(each, reason, "output"), cause=Cause.FORWARD) if each.cause in _PASSED_ON else each
        for each in own
    ]
    return sorted(findings, key=lambda finding: finding.cause is Cause.FORWARD)


def _key(evidence: Evidence, name: str, own: Finding, source: Source) -> object:
    """Equal of gradients that one fault makes wrong."""
    if name in evidence.idle or own.cause is not own_fault(evidence.gradients[name], evidence.n_ranks)[0]:
        return name  # it has a reason that isn't of tp's ranks
    if source.are_parts:
        return "parts", source.points
    if source.points and not source.right:
        return _LOSS
    if source.fault is not None:
        return "fault", source.right, source.fault
    return ("points", source.points) if source.points else name


def _known_as(key: object, source: Source, known: Iterable[object]) -> object:
    """The key of a fault that is known already and is this one, too: of parts that come from several places,
    one that they come from; of what tells nothing, one that is sure between the same points."""
    tagged = [each for each in known if isinstance(each, tuple)]
    match key:
        case ("parts", tuple(points)):
            return next((each for each in tagged if each[0] == "parts" and set(each[1]) <= set(points)), key)
        case ("points", _):
            return next((each for each in tagged if each[0] == "fault" and each[1] == source.right), key)
        case _:
            return key


def _of_one_source(evidence: Evidence, findings: Sequence[Finding], source: Source) -> list[Finding]:
    first, *others = findings
    first = _with_place(evidence, first, source, explains_more=bool(others))
    place = _place(evidence, first.subject, source)
    reason = f"the gradient that comes down to it is wrong from {place} on"
    return [first, *(_passed_on(each, reason, first.subject) for each in others)]


def _passed_on(finding: Finding, reason: str, explained_by: str) -> Finding:
    """What tells nothing by itself, as what follows; what does keeps its own reason."""
    tells = finding.cause not in _PASSED_ON and finding.cause is not Cause.NOTHING_ARRIVES
    if tells and (finding.ratio is None or finding.cause is not Cause.PARTS_NOT_SUMMED):
        return replace(finding, follows=explained_by)
    return replace(finding, cause=Cause.FOLLOWS, reason=reason, advice=None, follows=explained_by)


def _with_place(evidence: Evidence, finding: Finding, source: Source, *, explains_more: bool) -> Finding:
    """With where it begins, where its own gradient doesn't tell all."""
    seen = evidence.seen
    if evidence.trials.kept.intersection(source.points):
        what = f"what other ranks' tokens give back to {_place(evidence, finding.subject, source)}"
        reason = f"each rank has the gradient that its own tokens give, and nothing sums it with {what}"
        return replace(finding, cause=Cause.PARTS_NOT_SUMMED, reason=reason, advice=_OVER_TOKENS)
    if source.are_parts and finding.cause is Cause.UNKNOWN:
        n, points = evidence.n_ranks, [seen[at] for at in source.points]
        where = named(around([each.module for each in points]))
        takes = all(each.side is Side.TAKES for each in points)
        what = f"what {where} gives back to its input" if takes else f"what comes back to {where}"
        reason = f"{what} is a part on each of {n} ranks, and nothing sums them"
        cause = Cause.PARTS_NOT_SUMMED
        return replace(finding, cause=cause, reason=reason, advice=ADVICE[cause])
    right = sorted({spot(seen[at]) for at in source.right if judged(seen[at].gradient) is Judgement.RIGHT})
    if right and not source.are_parts and (explains_more or finding.cause is Cause.UNKNOWN):
        inner = [finding.subject.rpartition(".")[0], *(seen[at].module for at in source.points)]
        where = named(around([*inner, *(seen[at].module for at in source.right)]))
        reason = f"{finding.reason}. It begins in {where}: what comes back to {listed(right)} is right"
        return replace(finding, reason=reason)
    return finding


_OVER_TOKENS = "Sum over the ranks that share sequences what comes back to the keys and values of each."


def _place(evidence: Evidence, subject: str, source: Source) -> str:
    if not source.points:
        return named(subject.rpartition(".")[0])
    points = [evidence.seen[at] for at in source.points]
    return spot(points[0]) if len(points) == 1 else named(around([each.module for each in points]))


# ------------------------------------------------------------------------------------ each by itself


def _own_finding(evidence: Evidence, name: str) -> Finding:
    related, error = evidence.gradients[name], evidence.differences.wrong_gradients[name]
    is_missing = related.relation is Relation.MISSING
    cause, reason = own_fault(related, evidence.n_ranks)
    recut, advice = evidence.trials.recut, None
    if name in evidence.idle:
        cause, reason = Cause.NOTHING_ARRIVES, _of_idle(evidence.idle[name])
    elif recut is not None and recut.parameter == name:
        cause, reason, is_missing = Cause.CUT_AS_ONE, recut.reason, False
    elif name in evidence.along and (
        evidence.along[name].relation is Relation.PARTS or cause is Cause.UNKNOWN
    ):  # what is shifted over tp may look so over another axis that cuts the same dim
        return _finding_along(evidence, name)
    elif name in evidence.again and cause is Cause.UNKNOWN:
        cause, reason, advice = Cause.SUMMED_TOO_OFTEN, _of_again(evidence.again[name]), _OF_EACH
    kind = FindingKind.GRADIENT_MISSING if is_missing else FindingKind.GRADIENT_DIFFERS
    rule = applied_to(evidence.model).rule_for(name)
    ratio = related.factor if advice is None else None
    return Finding(kind, name, reason, error, ratio, advice or ADVICE.get(cause), cause, rule)


_OF_EACH = (
    "Sum over ranks what one backward gives (a parameter's hook sees that), not .grad, in which the earlier "
    "micro-batches are; or sum once, after the last of them."
)


def _of_again(times: Sequence[float]) -> str:
    told = listed([f"{each:.3g}" for each in times], len(times))
    return f"its micro-batches are in it {told} times: what was accumulated before is summed again"


def _of_idle(ranks: Sequence[int]) -> str:
    which = f"rank{'s' * (len(ranks) > 1)} {listed([str(rank) for rank in ranks])}"
    return f"its gradient is zero on {which}, and right on the others"


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
            cause, reason = Cause.WRONG_SHARD, f"along {along.named} {SHIFTED}"
            advice = ADVICE[cause]
        case Relation.ADDED:
            cause, reason = Cause.SUMMED_TOO_OFTEN, f"along {along.named} {ADDED}"
            advice = f"Don't sum over {along.named} what its ranks hold each for itself."
        case _:
            pass
    rule = applied_to(evidence.model).rule_for(name)
    return Finding(FindingKind.GRADIENT_DIFFERS, name, reason, error, None, advice, cause, rule)
