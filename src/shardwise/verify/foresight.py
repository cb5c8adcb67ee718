"""What can be foreseen of a plan without a rank: from one training step, traced unsharded and sharded on fake
tensors, and the shapes in both.

    several weights cut as one   what a parameter gives is taken apart along the dim of which this rank has
                                 the n-th part, and the parameter is cut plainly
    parts that nobody sums       a parameter that every rank holds whole meets n times smaller activations
                                 than unsharded, and nothing of its size is sent
    wholes that are summed       such a parameter meets DTensors that stand for n times more than there is, or
                                 whole ones under a sequence-parallel rule
    nothing arrives              a parameter has a gradient unsharded, and none when sharded
    logits nobody gathers        they are n times narrower, and the loss takes them for whole
    sizes that don't divide      a parameter is cut unevenly, and the step of the first or the last rank
                                 fails, or the two send unequal amounts

n: ranks. A cut of every second row, as of interleaved weights, is right, and so is one along another dim, as
that of each head. These are suspicions: whoever runs the plan knows better (run.py). What this file does not
see: values, so neither a wrong factor nor a wrong rank's part; a gradient that is a part though its parameter
meets whole activations.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from shardwise.core.case import StepSettings
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.placement import Partial
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.core.program import Holding, Phase, Program
from shardwise.models.source import ModelSource
from shardwise.parallel.apply import applied_to
from shardwise.parallel.loss import DTensorLoss, PlainLoss
from shardwise.trace.lineage import Cut, Lineage, Meeting, Shape
from shardwise.verify.observe import LogitsError
from shardwise.verify.reasons import ungathered
from shardwise.verify.rehearsal import Step, depth_of_each_kind, rehearsed
from shardwise.verify.words import ADVICE


@dataclass(frozen=True, slots=True)
class Foresight:
    """findings: suspicions. note: why there are none, where the model couldn't be traced."""

    findings: tuple[Finding, ...]
    note: str = ""


def foresee(source: ModelSource, plan: AnyPlan, tp: int, settings: StepSettings) -> Foresight:
    """Traces the step unsharded and as rank 0 of tp, of as many layers as hold one of each kind. Raises the
    InputErrors of a plan that is refused."""
    first = None
    # other layers, or a rule, may want one that was left out
    for depth in dict.fromkeys((depth_of_each_kind(source), None)):
        whole = rehearsed(source, TheirPlan.UNSHARDED, 1, settings, depth, 0)
        if whole.error is None:
            first = rehearsed(source, plan, tp, settings, depth, 0)
            if not first.is_refused_by(plan):
                break
    if first is None:
        return Foresight((), whole.failure)
    if first.error is not None:
        if first.is_refused_by(plan):
            raise first.error
        if first.is_untraceable_under(plan):
            seen = suspicions(whole, replace(first, error=None), None, tp)
            return Foresight(tuple(seen), first.failure)
    last = rehearsed(source, plan, tp, settings, depth, tp - 1) if uneven(first, tp) else None
    return Foresight(tuple(suspicions(whole, first, last, tp)))


def suspicions(whole: Step, first: Step, last: Step | None, tp: int) -> Iterator[Finding]:
    """All that the steps of rank 0 and, where parameters are cut unevenly, of the last rank show beside the
    unsharded one."""
    yield from _narrow_logits(whole.lineage, first, tp)
    suspected = [
        *cut_as_one(whole.lineage, first.lineage, tp),
        *summed_too_often(whole.lineage, first.lineage, first.whole_on_all, first.sequence_parallel, tp),
    ]
    if whole.program is not None and first.program is not None:
        suspected += parts_not_summed(
            whole.lineage, first.lineage, first.program, first.modules, tp, first.summed_together
        )
        suspected += without_gradient(whole.program, first.program)
    for finding in suspected:
        rule = applied_to(first.model).rule_for(finding.subject) if first.model is not None else None
        yield replace(finding, rule=rule)
    yield from _undivided(first, last, tp)
    if first.error is not None:
        yield Finding(FindingKind.CRASHES, first.failed_in, first.failure)


def _suspected(parameter: str, cause: Cause, reason: str) -> Finding:
    return Finding(FindingKind.SUSPECTED, parameter, reason, advice=ADVICE.get(cause), cause=cause)


# ------------------------------------------------------------------------------------ what two forwards show


def cut_as_one(whole: Lineage, part: Lineage, tp: int) -> Iterator[Finding]:
    """Parameters in which several weights lie, and of which each rank holds a chunk of all."""
    for name in sorted(part.cut_plainly):
        of_whole, of_part = ([cut for cut in each.cuts if cut.parameter == name] for each in (whole, part))
        if len(of_whole) != len(of_part):
            continue  # the sharded model goes another way
        pairs = zip(of_whole, of_part, strict=True)
        wrong = next((pair for pair in pairs if _is_apart(*pair, tp)), None)
        if wrong is not None:
            before, after = (f"{_shapes([cut.before])} into {_shapes(cut.pieces)}" for cut in wrong)
            reason = (
                f"what it gives is taken apart ({before}), so several weights lie in it, and it is cut as "
                f"one: what a rank takes apart ({after}) are other parts"
            )
            yield _suspected(name, Cause.CUT_AS_ONE, reason)


def _is_apart(whole: Cut, part: Cut, tp: int) -> bool:
    """Whether both take the same apart, along the dim of which a rank has its part."""
    if [len(piece) for piece in whole.pieces] != [len(piece) for piece in part.pieces]:
        return False
    dim = _cut_dim(whole.before, part.before, tp)
    if dim is None:
        return False
    if len(part.pieces[0]) == len(part.before):
        return all(any(piece[dim] < cut.before[dim] for piece in cut.pieces) for cut in (whole, part))
    return dim == len(part.before) - 1 and _is_regrouped(whole, part)


def _is_regrouped(whole: Cut, part: Cut) -> bool:
    """Whether the last dim is unfolded into more, of which the outermost, that a chunk is a part of, is as
    large on a rank as in the whole."""
    (outer,), (inner,) = whole.pieces, part.pieces
    for at, size in enumerate(outer):
        if size > 1 and prod(outer[at:]) == whole.before[-1]:
            return prod(inner[at:]) == part.before[-1] and inner[at] == size
    return False


def summed_too_often(
    whole: Lineage, part: Lineage, on_all: frozenset[str], sequence_parallel: frozenset[str], tp: int
) -> Iterator[Finding]:
    """Parameters that every rank holds whole and that take what every rank has whole for a part.
    sequence_parallel: those whose rule says so."""
    met = _met(whole)
    for name in sorted(on_all & met.keys()):
        meetings = (meeting for meeting in part.meetings if meeting.parameter == name)
        reasons = (_taken_for_part(each, met[name], name in sequence_parallel, tp) for each in meetings)
        reason = next(filter(None, reasons), None)
        if reason is not None:
            times = f"and its gradient is summed: {tp} times what it is"
            yield _suspected(name, Cause.SUMMED_TOO_OFTEN, f"{reason}, {times}")


def _taken_for_part(meeting: Meeting, met: set[Shape], says_part: bool, tp: int) -> str | None:
    """met: the shapes that the parameter meets in the unsharded model. says_part: whether its rule takes its
    input for a part."""
    if meeting.of_dtensors:
        claimed = _first_cut((shape for shape in meeting.shapes if shape not in met), met, tp)
        if claimed is None:
            return None
        stands_for, taken = claimed
        return (
            f"it takes {_shapes([taken])}, which every rank has whole, for a part of {_shapes([stands_for])}"
        )
    if says_part and set(meeting.shapes) <= met:
        return "its rule takes the input for a part of the sequence, every rank has the whole"
    return None


def parts_not_summed(
    whole: Lineage,
    part: Lineage,
    program: Program,
    modules: Collection[str],
    tp: int,
    together: Collection[str] = (),
) -> Iterator[Finding]:
    """Parameters that every rank holds whole, that meet a part of the activations on each, and whose
    gradients nobody sums.

    modules: of the model. What is sent for none of them is many gradients at once; where it is large enough,
    all of them. together: those that lie in one storage after the step, as views of what was summed.
    """
    met, now = _met(whole), _met(part)
    calls = [
        (call.module, call.call.payload_bytes)
        for call in program.collectives()
        if call.phase in (Phase.BACKWARD, Phase.REDUCE)
    ]
    suspects = []
    for holding in program.holdings:
        is_summed = holding.name in together or _is_summed(holding, calls)
        if not holding.is_sharded and not _is_partial(holding) and not is_summed:
            smaller = _first_cut(met.get(holding.name, ()), now.get(holding.name, ()), tp)
            if smaller is not None and smaller[1] not in met[holding.name]:
                suspects.append((holding, *smaller))
    flattened = max((n_bytes for module, n_bytes in calls if module not in modules), default=0)
    known = sum(each.gradient_bytes for each in program.holdings if each.name in together)
    if flattened - known >= sum(holding.gradient_bytes for holding, *_ in suspects):
        return
    for holding, of, shape in suspects:
        parts = f"each of {tp} ranks meets it with {_shapes([shape])} of {_shapes([of])}"
        reason = f"{parts}, a part of its gradient, and nothing sums them"
        yield _suspected(holding.name, Cause.PARTS_NOT_SUMMED, reason)


def without_gradient(whole: Program, part: Program) -> Iterator[Finding]:
    """Parameters that have a gradient in the unsharded model alone."""
    trained = {holding.name for holding in whole.holdings if holding.grad_shape is not None}
    for holding in part.holdings:
        if holding.name in trained and holding.grad_shape is None:
            yield _suspected(holding.name, Cause.NOTHING_ARRIVES, "no gradient arrives")


def _is_partial(holding: Holding) -> bool:
    """Whether there is no gradient, or DTensor knows that it is a part."""
    return holding.grad_placement is None or Partial() in holding.grad_placement


def _is_summed(holding: Holding, calls: Sequence[tuple[str, int]]) -> bool:
    """Whether the backward sends something of its gradient's size for its module or one around it."""
    return any(
        n_bytes == holding.gradient_bytes and (not module or f"{holding.module}.".startswith(f"{module}."))
        for module, n_bytes in calls
    )


def _narrow_logits(whole: Lineage, first: Step, tp: int) -> Sequence[Finding]:
    logits, expected = first.lineage.logits, whole.logits
    if logits is None or expected is None or first.model is None:
        return ()
    takes_whole = isinstance(applied_to(first.model).loss, PlainLoss | DTensorLoss)
    if not takes_whole or logits[-1] == expected[-1] or _cut_dim(expected, logits, tp) is None:
        return ()
    return ungathered(str(LogitsError(logits[-1], expected[-1])))


# ------------------------------------------------------------------------------ sizes that don't divide


def uneven(step: Step, tp: int) -> dict[str, tuple[int, int]]:
    """Parameters that tp doesn't divide: name -> (dim, size)."""
    cut_unevenly = {}
    for name, parameter in step.model.named_parameters() if step.model is not None else ():
        for placement in getattr(parameter, "placements", ()):
            dim = placement.dim % parameter.dim() if placement.is_shard() else None
            if dim is not None and parameter.shape[dim] % tp:
                cut_unevenly[name] = (dim, int(parameter.shape[dim]))
    return cut_unevenly


def _undivided(first: Step, last: Step | None, tp: int) -> Iterator[Finding]:
    """Uneven cuts that the plan doesn't get through with."""
    if last is None or first.model is None:
        return
    failed = next((step for step in (first, last) if step.error is not None), None)
    if failed is not None:
        what = f"a rank's step fails: {failed.failure}"
    elif _sent(first) != _sent(last):
        what = "the first and the last rank send unequal amounts, which hangs or mixes them up"
    else:
        return
    for name, (dim, size) in uneven(first, tp).items():
        if failed is None or _around(name) in str(failed.error):
            reason = f"tp={tp} doesn't divide its dim {dim} of {size}, which is cut, and {what}"
            divisors = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
            advice, rule = (
                f"Use tp in {{{divisors}}}, or leave it whole.",
                applied_to(first.model).rule_for(name),
            )
            yield Finding(FindingKind.SIZES_NOT_DIVISIBLE, name, reason, advice=advice, rule=rule)


def _around(parameter: str) -> str:
    """The module around the one that owns a parameter: what one cuts unevenly, its neighbour trips over."""
    return parameter.rpartition(".")[0].rpartition(".")[0]


def _sent(step: Step) -> list[tuple[str, int]]:
    """What a rank sends, but for what the data decides."""
    calls = step.program.collectives() if step.program is not None else ()
    return [(str(each.call.kind), each.call.payload_bytes) for each in calls if each.by_data is None]


# ------------------------------------------------------------------------------------------------- shapes


def _cut_dim(whole: Shape, part: Shape, tp: int) -> int | None:
    """The one dim of which `part` has the tp-th part of `whole`, as rank 0 does."""
    differing = [dim for dim, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    if len(whole) != len(part) or len(differing) != 1:
        return None
    (dim,) = differing
    return dim if part[dim] == -(-whole[dim] // tp) else None


def _first_cut(wholes: Iterable[Shape], parts: Iterable[Shape], tp: int) -> tuple[Shape, Shape] | None:
    """A whole and a part of it; None where there are none."""
    pairs = product(wholes, parts)
    return next(((whole, part) for whole, part in pairs if _cut_dim(whole, part, tp) is not None), None)


def _met(lineage: Lineage) -> dict[str, set[Shape]]:
    """Parameter -> the shapes of all activations that it meets."""
    met: dict[str, set[Shape]] = {}
    for meeting in lineage.meetings:
        met.setdefault(meeting.parameter, set()).update(meeting.shapes)
    return met


def _shapes(shapes: Sequence[Shape]) -> str:
    return " + ".join(str(list(shape)) for shape in shapes)
