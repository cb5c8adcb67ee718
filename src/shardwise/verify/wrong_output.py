"""Why the outputs are wrong: the first value that is, and what was tried on it."""

from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.parallel.apply import applied_to
from shardwise.verify.evidence import Added, Evidence
from shardwise.verify.relation import Relation
from shardwise.verify.trail import Side
from shardwise.verify.words import ADVICE, listed, named, relation_words, spot, times_of

_OUTPUT_WORDS = {
    Relation.UNEQUAL: "{} isn't equal on all ranks",
    Relation.ZERO: "{} is zero",
    Relation.SHIFTED: "each rank has another rank's part",
}


def output_finding(evidence: Evidence) -> Finding:
    """With the rule of the module that is the first to be wrong."""
    related, at = evidence.output, evidence.roots.first_wrong
    if related is not None and related.relation is Relation.SHARDED:
        cause = Cause.NOT_GATHERED
        reason = f"each rank has 1/{evidence.n_ranks} of the logits, and the loss takes them for all"
    elif at is None:
        cause, reason = Cause.UNKNOWN, "the outputs aren't the unsharded model's"
    else:
        cause, reason = _first_fault(evidence, at)
    reason += _counted(evidence)
    rule = applied_to(evidence.model).rule_for(evidence.seen[at].module) if at is not None else None
    error, advice = evidence.differences.output, ADVICE.get(cause)
    return Finding(FindingKind.OUTPUT_DIFFERS, "output", reason, error, advice=advice, cause=cause, rule=rule)


def place_of_first(evidence: Evidence) -> str:
    """Where the forward begins to be wrong, as far as that is known."""
    at = evidence.roots.first_wrong
    return spot(evidence.seen[at]) if at is not None else "its outputs"


def _counted(evidence: Evidence) -> str:
    """What is called more often, or less often, than unsharded."""
    if not evidence.counts:
        return ""
    name, (sharded, unsharded) = next(iter(evidence.counts.items()))
    more = f", and so are {len(evidence.counts) - 1} more modules" if len(evidence.counts) > 1 else ""
    return f". {named(name)} is called {_often(sharded)} and, unsharded, {_often(unsharded)}{more}"


def _often(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _first_fault(evidence: Evidence, at: int) -> tuple[Cause, str]:
    """Of the first value that can't be right, or of what it is made of."""
    seen, trials = evidence.seen[at], evidence.trials
    assert seen.value is not None
    if seen.side is Side.GIVES:
        words = relation_words(seen.value, _filled("its output"), "its output")
        reason = f"the first module whose output differs is {named(seen.module)}: {words}"
    else:
        words = relation_words(seen.value, _filled("it"), "it")
        reason = f"the first value that differs is what {named(seen.module)} takes: {words}"
    parts = evidence.roots.parts_before(at)
    if trials.recut is not None:
        return Cause.CUT_AS_ONE, f"{reason}. {trials.recut.parameter}: {trials.recut.reason}"
    if trials.added is not None:
        cause, words = _sum_fault(evidence, trials.added)
        return cause, f"{reason}. {words}"
    if parts and seen.value.relation is not Relation.MULTIPLE:
        givers = listed([named(evidence.seen[each].module) for each in parts])
        sums = f"{givers} gives each rank a part of a sum, and nothing sums them"
        return Cause.PARTS_NOT_SUMMED, f"{sums}; {reason}"
    if trials.normalises:
        statistics = "It takes statistics over all of its input, and a rank has a part of that"
        return Cause.PART_FOR_WHOLE, f"{reason}. {statistics}"
    match seen.value.relation:
        case Relation.SHIFTED:
            return Cause.WRONG_SHARD, reason
        case Relation.MULTIPLE if abs(seen.value.factor or 0.0) > 1:
            return Cause.SUMMED_TOO_OFTEN, reason
        case Relation.MULTIPLE:
            return Cause.AVERAGED, reason
        case _:
            return _mixture(evidence, at, reason)


def _filled(what: str) -> dict[Relation, str]:
    return {relation: words.format(what) for relation, words in _OUTPUT_WORDS.items()}


def _sum_fault(evidence: Evidence, added: Added) -> tuple[Cause, str]:
    """Of what is added once on every rank."""
    what = added.what if isinstance(added.what, str) else spot(evidence.seen[added.what])
    if added.times > 1:
        words = (
            f"{what} is in it {times_of(added.times)}: every rank adds it before the ranks' values are summed"
        )
        return Cause.SUMMED_TOO_OFTEN, words
    if added.times:
        return (
            Cause.AVERAGED,
            f"only {times_of(added.times)} {what} is in it: it is divided, and nothing sums that",
        )
    return Cause.FORWARD, f"{what} isn't in it: no rank adds it"


def _mixture(evidence: Evidence, at: int, reason: str) -> tuple[Cause, str]:
    """Where a module puts together what its modules give, of which a rank has a part of one and all of the
    other."""
    seen = evidence.seen
    given = [each for each in evidence.roots.made_of(at) if seen[each].side is Side.GIVES]
    related = [(named(seen[each].module), seen[each].value) for each in given]
    cut = [name for name, each in related if each is not None and each.relation is Relation.SHARDED]
    whole = [name for name, each in related if each is not None and each.relation is Relation.WHOLE]
    if seen[at].side is Side.GIVES or evidence.n_ranks == 1 or not cut:
        return Cause.FORWARD, reason
    if not whole:
        return Cause.FORWARD, f"{reason}, and what it is made of, the output of {listed(cut)}, is right"
    meets = f"1/{evidence.n_ranks} of the output of {listed(cut)} and all of the output of {listed(whole)}"
    return Cause.PARTS_MEET_WHOLES, f"{reason}. It is made of {meets}"
