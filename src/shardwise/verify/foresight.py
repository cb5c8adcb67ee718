"""What can be foreseen of a plan without a rank: from one training step, traced unsharded and sharded on fake tensors, and the shapes in both.

    fault                             evidence
    several weights cut as one        what a parameter gives is taken apart along the dim of which this rank has the n-th part, and the parameter is cut plainly
    parts that nobody sums            a parameter that every rank holds whole meets n times smaller activations than unsharded, and nothing of its size is sent
    wholes that are summed            such a parameter meets DTensors that stand for n times more than there is, or whole ones under a sequence-parallel rule
    nothing arrives                   a parameter has a gradient unsharded, and none when sharded
    logits that nobody gathers        they are n times narrower, and the loss takes them for whole
    sizes that don't divide           a parameter is cut unevenly, and the step of the first or the last rank fails, or the two send unequal amounts

n: ranks. A cut of every second row, as of interleaved weights, is right, and so is one along another dim, as that of each head. These are suspicions:
whoever runs the plan knows better (run.py). What this file does not see: values, so neither a wrong factor nor a wrong rank's part; a gradient that is a
part though its parameter meets whole activations.
"""

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from shardwise.core.case import StepSettings
from shardwise.core.errors import PlanError, ShardwiseError
from shardwise.core.finding import Cause, Finding, FindingKind
from shardwise.core.mesh import Mesh, Role
from shardwise.core.placement import Partial
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.program import Holding, Phase, Program
from shardwise.core.shown import shown
from shardwise.models.source import ModelSource
from shardwise.parallel.apply import applied_to
from shardwise.parallel.loss import DTensorLoss, PlainLoss
from shardwise.torch_private import DataDependentOutputException, DynamicOutputShapeException
from shardwise.trace.layers import find_layers
from shardwise.trace.lineage import Cut, Lineage, Meeting, Shape, TooLongError, Watch
from shardwise.trace.trace import trace
from shardwise.verify.reasons import ADVICE, rule_of, ungathered

LIMIT_S = 60.0
"""For one forward on fake tensors; the largest of the known models take a quarter of it."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """findings: suspicions. note: why there are none, where the model couldn't be traced."""

    findings: tuple[Finding, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's step, as far as it could be traced. model: as the plan left it."""

    program: Program | None
    lineage: Lineage
    model: nn.Module | None
    error: ShardwiseError | None = None


def foresee(source: ModelSource, plan: AnyPlan, tp: int, *, batch: int, seq: int) -> Foresight:
    """Traces the step unsharded and as rank 0 of tp, of as many layers as hold one of each kind. Raises the InputErrors of a plan that is refused."""
    settings = StepSettings(batch=batch, seq=seq, dtype="float32")
    first = None
    for depth in dict.fromkeys(
        (_depth(source), None)
    ):  # other layers, or a rule, may want one that was left out
        whole = _step(source, TheirPlan.UNSHARDED, 1, settings, depth, 0)
        if whole.error is None:
            first = _step(source, plan, tp, settings, depth, 0)
            if not _is_refused(first.error, plan):
                break
    if first is None:
        assert whole.error is not None
        return Foresight((), _told(whole.error))
    if first.error is not None:
        if _is_refused(first.error, plan):
            raise first.error
        if _is_untraceable(first, plan):
            return Foresight(
                tuple(suspicions(whole, replace(first, error=None), None, tp)), _told(first.error)
            )
    last = _step(source, plan, tp, settings, depth, tp - 1) if uneven(first, tp) else None
    return Foresight(tuple(suspicions(whole, first, last, tp)))


def suspicions(whole: Step, first: Step, last: Step | None, tp: int) -> Iterator[Finding]:
    """All that the steps of rank 0 and, where parameters are cut unevenly, of the last rank show beside the unsharded one."""
    model = first.model
    yield from _narrow_logits(whole.lineage, first, tp)
    found = [
        *cut_as_one(whole.lineage, first.lineage, tp),
        *summed_too_often(
            whole.lineage, first.lineage, _whole_on_all(first), _sequence_parallel(first.program), tp
        ),
    ]
    if whole.program is not None and first.program is not None:
        modules = {name for name, _ in model.named_modules() if name} if model is not None else set()
        found += parts_not_summed(whole.lineage, first.lineage, first.program, modules, tp)
        found += without_gradient(whole.program, first.program)
    yield from (
        replace(finding, rule=rule_of(model, finding.subject)) if model is not None else finding
        for finding in found
    )
    yield from _undivided(first, last, tp)
    if first.error is not None:
        text = _told(first.error)
        yield Finding(
            FindingKind.CRASHES, text.partition(" raised ")[0] if " raised " in text else "model", text
        )


# ------------------------------------------------------------------------------------ what two forwards show


def cut_as_one(whole: Lineage, part: Lineage, tp: int) -> Iterator[Finding]:
    """Parameters in which several weights lie, and of which each rank holds a chunk of all."""
    for name in sorted(part.cut_plainly):
        cuts = [[cut for cut in lineage.cuts if cut.parameter == name] for lineage in (whole, part)]
        if len(cuts[0]) != len(cuts[1]):
            continue  # the sharded model goes another way
        wrong = next(((a, b) for a, b in zip(*cuts, strict=True) if _is_apart(a, b, tp)), None)
        if wrong is not None:
            before, after = wrong
            reason = (
                f"what it gives is taken apart ({_shapes([before.before])} into {_shapes(before.pieces)}), so several weights lie in it, and it is cut "
                f"as one: what a rank takes apart ({_shapes([after.before])} into {_shapes(after.pieces)}) are other parts"
            )
            yield Finding(
                FindingKind.SUSPECTED, name, reason, advice=ADVICE[Cause.CUT_AS_ONE], cause=Cause.CUT_AS_ONE
            )


def _is_apart(whole: Cut, part: Cut, tp: int) -> bool:
    """Whether both take the same apart, along the dim of which a rank has its part."""
    if len(whole.before) != len(part.before) or [len(piece) for piece in whole.pieces] != [
        len(piece) for piece in part.pieces
    ]:
        return False
    dim = _cut_dim(whole.before, part.before, tp)
    if dim is None:
        return False
    if len(part.pieces[0]) == len(part.before):
        return any(piece[dim] < part.before[dim] for piece in part.pieces) and any(
            piece[dim] < whole.before[dim] for piece in whole.pieces
        )
    return dim == len(part.before) - 1 and _is_regrouped(whole, part)


def _is_regrouped(whole: Cut, part: Cut) -> bool:
    """Whether the last dim is unfolded into more, of which the outermost, that a chunk is a part of, is as large on a rank as in the whole."""
    (outer,), (inner,) = whole.pieces, part.pieces
    first = next(
        (at for at in range(len(outer)) if prod(outer[at:]) == whole.before[-1] and outer[at] > 1), None
    )
    if first is None or prod(inner[first:]) != part.before[-1]:
        return False
    return outer[first] == inner[first]


def summed_too_often(
    whole: Lineage, part: Lineage, on_all: frozenset[str], sequence_parallel: frozenset[str], tp: int
) -> Iterator[Finding]:
    """Parameters that every rank holds whole and that take what every rank has whole for a part. sequence_parallel: those whose rule says so."""
    met = _met(whole)
    for name in sorted(on_all & met.keys()):
        for meeting in _meetings(part, name):
            pairs = (
                (each, shape) for shape in meeting.shapes if shape not in met[name] for each in met[name]
            )
            claimed = next(
                ((each, shape) for each, shape in pairs if _cut_dim(shape, each, tp) is not None), None
            )
            if meeting.of_dtensors and claimed is not None:
                taken, stands_for = claimed
                reason = (
                    f"it takes {_shapes([taken])}, which every rank has whole, for a part of {_shapes([stands_for])}, and its gradient is summed: "
                    f"{tp} times what it is"
                )
            elif not meeting.of_dtensors and name in sequence_parallel and set(meeting.shapes) <= met[name]:
                reason = f"its rule takes the input for a part of the sequence, every rank has the whole, and its gradient is summed: {tp} times what it is"
            else:
                continue
            yield Finding(
                FindingKind.SUSPECTED,
                name,
                reason,
                advice=ADVICE[Cause.SUMMED_TOO_OFTEN],
                cause=Cause.SUMMED_TOO_OFTEN,
            )
            break


def parts_not_summed(
    whole: Lineage, part: Lineage, program: Program, modules: Collection[str], tp: int
) -> Iterator[Finding]:
    """Parameters that every rank holds whole, that meet a part of the activations on each, and whose gradients nobody sums.

    modules: of the model. What is sent for none of them is many gradients at once; where it is large enough, all of them.
    """
    met, now = _met(whole), _met(part)
    calls = [
        (call.module, call.call.payload_bytes)
        for call in program.collectives()
        if call.phase in (Phase.BACKWARD, Phase.REDUCE)
    ]
    suspects = []
    for holding in program.holdings:
        if not holding.is_sharded and not _is_partial(holding) and not _is_summed(holding, calls):
            pairs = [
                (shape, each) for shape in now.get(holding.name, ()) for each in met.get(holding.name, ())
            ]
            smaller = next(
                ((shape, each) for shape, each in pairs if _cut_dim(each, shape, tp) is not None), None
            )
            if smaller is not None and smaller[0] not in met[holding.name]:
                suspects.append((holding, *smaller))
    flattened = max((n_bytes for module, n_bytes in calls if module not in modules), default=0)
    if flattened >= sum(holding.gradient_bytes for holding, *_ in suspects):
        return
    for holding, shape, each in suspects:
        reason = f"each of {tp} ranks meets it with {_shapes([shape])} of {_shapes([each])}, a part of its gradient, and nothing sums them"
        yield Finding(
            FindingKind.SUSPECTED,
            holding.name,
            reason,
            advice=ADVICE[Cause.PARTS_NOT_SUMMED],
            cause=Cause.PARTS_NOT_SUMMED,
        )


def without_gradient(whole: Program, part: Program) -> Iterator[Finding]:
    """Parameters that have a gradient in the unsharded model alone."""
    trained = {holding.name for holding in whole.holdings if holding.grad_shape is not None}
    for holding in part.holdings:
        if holding.name in trained and holding.grad_shape is None:
            yield Finding(
                FindingKind.SUSPECTED, holding.name, "no gradient arrives", cause=Cause.NOTHING_ARRIVES
            )


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
    if (
        logits is None
        or expected is None
        or first.model is None
        or not isinstance(applied_to(first.model).loss, PlainLoss | DTensorLoss)
    ):
        return ()
    if logits[-1] == expected[-1] or _cut_dim(expected, logits, tp) is None:
        return ()
    return ungathered(
        f"the logits are {logits[-1]} wide on a rank, the unsharded model's {expected[-1]}, and the loss takes them for whole"
    )


# ------------------------------------------------------------------------------------------ sizes that don't divide


def uneven(step: Step, tp: int) -> dict[str, tuple[int, int]]:
    """Parameters that tp doesn't divide: name -> (dim, size)."""
    found = {}
    for name, parameter in step.model.named_parameters() if step.model is not None else ():
        for placement in getattr(parameter, "placements", ()):
            dim = placement.dim % parameter.dim() if placement.is_shard() else None
            if dim is not None and parameter.shape[dim] % tp:
                found[name] = (dim, int(parameter.shape[dim]))
    return found


def _undivided(first: Step, last: Step | None, tp: int) -> Iterator[Finding]:
    """Uneven cuts that the plan doesn't get through with."""
    if last is None:
        return
    error = first.error or last.error
    if error is not None:
        what = f"a rank's step fails: {_told(error)}"
    elif (
        first.program is not None and last.program is not None and _sent(first.program) != _sent(last.program)
    ):
        what = "the first and the last rank send unequal amounts, which hangs or mixes them up"
    else:
        return
    for name, (dim, size) in uneven(first, tp).items():
        if error is not None and _around(name) not in str(error):
            continue
        rule = rule_of(first.model, name) if first.model is not None else None
        reason = f"tp={tp} doesn't divide its dim {dim} of {size}, which is cut, and {what}"
        divisors = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
        yield Finding(
            FindingKind.SIZES_NOT_DIVISIBLE,
            name,
            reason,
            advice=f"Use tp in {{{divisors}}}, or leave it whole.",
            rule=rule,
        )


def _around(parameter: str) -> str:
    """The module around the one that owns a parameter: what one cuts unevenly, its neighbour trips over."""
    return parameter.rpartition(".")[0].rpartition(".")[0]


def _sent(program: Program) -> list[tuple[str, int]]:
    return [
        (str(item.call.kind), item.call.payload_bytes)
        for item in program.collectives()
        if item.by_data is None
    ]


# ------------------------------------------------------------------------------------------------- shapes


def _cut_dim(whole: Shape, part: Shape, tp: int) -> int | None:
    """The one dim of which `part` has the tp-th part of `whole`, as rank 0 does."""
    differing = [dim for dim, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    if len(whole) != len(part) or len(differing) != 1:
        return None
    (dim,) = differing
    return dim if part[dim] == -(-whole[dim] // tp) else None


def _met(lineage: Lineage) -> dict[str, set[Shape]]:
    """Parameter -> the shapes of all activations that it meets."""
    found: dict[str, set[Shape]] = {}
    for meeting in lineage.meetings:
        found.setdefault(meeting.parameter, set()).update(meeting.shapes)
    return found


def _meetings(lineage: Lineage, name: str) -> Iterator[Meeting]:
    return (meeting for meeting in lineage.meetings if meeting.parameter == name)


def _shapes(shapes: Sequence[Shape]) -> str:
    return " + ".join(str(list(shape)) for shape in shapes)


def _whole_on_all(step: Step) -> frozenset[str]:
    """Parameters that every rank holds whole."""
    if step.model is None:
        return frozenset()
    return frozenset(
        name
        for name, p in step.model.named_parameters()
        if all(placement.is_replicate() for placement in getattr(p, "placements", ()))
    )


def _sequence_parallel(program: Program | None) -> frozenset[str]:
    """Parameters of modules whose rule is for a part of the sequence."""
    if program is None:
        return frozenset()
    uses = (use for use in program.rules if use.style == "sequence_parallel")
    modules = {name for use in uses for name in use.modules}
    return frozenset(holding.name for holding in program.holdings if holding.module in modules)


# ----------------------------------------------------------------------------------------------- tracing


def _depth(source: ModelSource) -> int | None:
    """As many of the first layers as hold one of each kind; None for a model without layers."""
    model = source.build(dtype=torch.float32)
    layers = find_layers(model)
    return max(2, layers.kinds(model)) if layers is not None else None


def _is_refused(error: ShardwiseError | None, plan: AnyPlan) -> bool:
    """Whether a plan of ours doesn't fit the model, rather than fail while it runs."""
    return isinstance(plan, Plan) and isinstance(error, PlanError) and error.__cause__ is None


def _is_untraceable(step: Step, plan: AnyPlan) -> bool:
    """Whether it fails because there is no data or no time; or can't be built without weights, as a factory that shards itself may not."""
    error = step.error
    has_no_data = error is not None and isinstance(
        error.__cause__, DataDependentOutputException | DynamicOutputShapeException
    )
    return has_no_data or isinstance(error, TooLongError) or (step.model is None and plan is TheirPlan.OWN)


def _told(error: ShardwiseError) -> str:
    """What a trace said of the model, without the names of plan and model, which stand above it, and without its advice."""
    text = (
        str(error)
        if error.__cause__ is None
        else re.sub(r'^(plan "[^"]*": )?model "[^"]*": | See whether it .*$', "", str(error))
    )
    return shown(text, 300)


def _step(
    source: ModelSource, plan: AnyPlan, tp: int, settings: StepSettings, depth: int | None, rank: int
) -> Step:
    watch = Watch(LIMIT_S)

    def attach(model: nn.Module) -> None:
        if hasattr(
            model, "set_experts_implementation"
        ):  # a loop over the experts that were chosen depends on the data
            model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # a method of transformers' models
        watch.attach(model)

    try:
        with watch, _quietly():
            program = trace(
                source,
                plan,
                Mesh.of({Role.CUTS_TENSORS: tp}),
                settings,
                rank=rank,
                compress=False,
                depth=depth,
                on_model=attach,
            )
    except ShardwiseError as error:
        return Step(None, watch.lineage, watch.model, error)
    return Step(program, watch.lineage, watch.model)


@contextmanager
def _quietly() -> Iterator[None]:
    """What libraries warn of while a model is built and run isn't about its plan."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs what a fake op raises, which is told here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
