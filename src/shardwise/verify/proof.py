"""The proof, on real ranks: the same weights, unsharded against sharded. Outputs, loss and every gradient,
then steps of the optimizer.

`verify` and `compare` both come here. Every rank runs the unsharded model whole, so what ranks tell each
other is a few numbers per parameter. Only where something is wrong do they exchange what they hold, and run
both models once more with an eye on every module: closer.py. How far a right plan may be off: expected.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import STAGES_AXIS, Role, role_of
from shardwise.core.verification import Proof
from shardwise.parallel.apply import applied_to
from shardwise.parallel.loss import Loss, PlainLoss, VocabParallelLoss
from shardwise.parallel.stages import stage_of
from shardwise.step.groups import mesh_of
from shardwise.step.portion import Portion
from shardwise.verify.closer import evidence
from shardwise.verify.exchange import gathered_ints, largest
from shardwise.verify.expected import STEPS, Differences, GradientError, Unsharded, trained
from shardwise.verify.held import distances, relative, size
from shardwise.verify.observe import Observed, observe
from shardwise.verify.ranks import disagreements, held_alike
from shardwise.verify.reasons import explain_differences
from shardwise.verify.words import listed

WEIGHTS_TOLERANCE = 1e-4
"""After the steps, relative: an element of a gradient may be noise where the whole isn't. A wrong norm or a
forgotten parameter is off by 1e-2."""


def prove(
    model: nn.Module,
    expected: Unsharded,
    remake: Callable[[], nn.Module],
    portion: Portion,
    smallest: Unsharded | None = None,
) -> tuple[Proof, tuple[Finding, ...]]:
    """Compares the sharded `model` with what the unsharded one gave. All ranks must call it; all get the same
    answer, but for the reasons that data-parallel ranks read off their own portions.

    remake: makes the unsharded model again, with the same weights, where it has to be looked at more closely.
    smallest: what it gave for a smaller batch, on which the sharded one is compared too.
    """
    observed = _observed(model, expected, portion)
    differences = _differences(model, observed, expected, portion)
    compared = expected
    if smallest is not None and not differences.are_wrong:
        of_smallest = _differences(model, _observed(model, smallest, portion), smallest, portion)
        if of_smallest.are_wrong:
            differences, compared = of_smallest, smallest
    norm_error = weights_error = None
    if differences.are_wrong:
        findings = explain_differences(evidence(model, remake(), compared, differences, portion))
        if compared is not expected:
            findings = [_at_one_batch(each, compared, expected) for each in findings]
    elif expected.norms:
        weights, norm_errors = _after_steps(model, expected, portion)
        weights_error, norm_error = max(weights.values(), default=0.0), max(norm_errors)
        findings = _weight_findings(weights, norm_errors, _alone(model, observed, expected), expected)
        findings += _drifts(model, portion)
    else:
        findings = []
    findings = _of_all_stages(findings, model, portion)
    worst, worst_error = differences.worst_gradient
    proof = Proof(
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        noise=compared.noise,
        tolerance=compared.tolerance,
        output_error=differences.output,
        loss_error=differences.loss,
        parameters_compared=len(differences.gradients),
        worst_gradient=worst,
        worst_gradient_error=worst_error,
        steps=len(expected.norms),
        norm_error=norm_error,
        weights_error=weights_error,
        without_gradient=tuple(
            name for name in expected.without_gradient if not differences.gradients[name].is_wrong
        ),
    )
    return proof, tuple(findings)


def _at_one_batch(finding: Finding, compared: Unsharded, expected: Unsharded) -> Finding:
    at, right = len(compared.batches[0][0]), len(expected.batches[0][0])
    return replace(finding, reason=f"{finding.reason} (at batch {at}; at batch {right} it is right)")


def _observed(model: nn.Module, expected: Unsharded, portion: Portion) -> Observed:
    return observe(model, expected.batches[0], portion, width=expected.observed.own_logits.shape[-1])


def _of_all_stages(findings: list[Finding], model: nn.Module, portion: Portion) -> list[Finding]:
    """What is found of a parameter is known where it is held; what is found of outputs, on the last stage."""
    stage = stage_of(model)
    if stage is None or portion.mesh is None:
        return findings
    held = {name for name, _ in model.named_parameters()}
    mine = [each for each in findings if each.subject in held or (stage.is_last and "." not in each.subject)]
    every: list[list[Finding]] = [[] for _ in range(stage.pipeline.stages)]
    dist.all_gather_object(every, mine, group=portion.mesh.get_group(STAGES_AXIS))
    known = {each.subject: each for found in every for each in found}
    order = {each.subject: at for at, each in enumerate(findings)}  # causes first, on every stage alike
    return sorted(known.values(), key=lambda each: order.get(each.subject, len(order)))


def _differences(model: nn.Module, observed: Observed, expected: Unsharded, portion: Portion) -> Differences:
    whole = expected.observed
    return Differences(
        output=_output_error(observed.logits, whole.own_logits, applied_to(model).loss, portion),
        loss=largest(abs(observed.loss - whole.loss) / abs(whole.loss)),
        gradients=gradient_errors(model, observed.gradients, whole.gradients, expected.allowed),
        tolerance=expected.tolerance,
    )


def gradient_errors(
    model: nn.Module,
    gradients: Mapping[str, Tensor | None],
    whole: Mapping[str, Tensor | None],
    allowed: Mapping[str, float],
) -> dict[str, GradientError]:
    """By parameter. allowed: ||s - g||, as in expected.py; nothing where a parameter has no gradient."""
    errors = {}
    for name, off in distances(model, gradients, whole).items():
        expected = whole[name]
        own = size(expected) if expected is not None else 0.0
        missing = float("inf") if off else 0.0
        most = allowed.get(name, 0.0)
        errors[name] = GradientError(off / own if own else missing, off / most if most else missing)
    return errors


def _output_error(logits: Tensor | None, whole: Tensor, loss: Loss, portion: Portion) -> float:
    """logits: None on a stage that gives none. loss: it knows which columns of the whole logits a rank has,
    which are dealt out where the head is tied to an interleaved table."""
    if logits is None:
        return largest(0.0)
    whole = torch.cat(portion.of(whole))
    sizes = gathered_ints(logits.shape[-1], portion.tp_group)
    rank = dist.get_rank(portion.tp_group)
    if not isinstance(loss, PlainLoss) and any(width != whole.shape[-1] for width in sizes):
        if sum(sizes) != whole.shape[-1]:
            return largest(float("inf"))
        if isinstance(loss, VocabParallelLoss):
            whole = whole.index_select(-1, loss.ownership.ids_of(rank).to(whole.device))
        else:
            whole = whole.narrow(-1, sum(sizes[:rank]), logits.shape[-1])
    return largest(relative(logits, whole))


def _after_steps(
    model: nn.Module, expected: Unsharded, portion: Portion
) -> tuple[dict[str, float], list[float]]:
    """How far each parameter that can be told, and the gradient norm of each step, are off the unsharded ones
    after the optimizer's steps; relative."""
    after, norms = trained(model, expected.batches, portion, expected.max_norm)
    pairs = zip(norms, expected.norms, strict=True)
    norm_errors = [largest(abs(norm - whole) / whole) for norm, whole in pairs]
    whole = {name: weights for name, weights in expected.after.items() if expected.is_told(name)}
    weights = {name: off / (size(whole[name]) or 1.0) for name, off in distances(model, after, whole).items()}
    return weights, norm_errors


def _alone(model: nn.Module, observed: Observed, expected: Unsharded) -> list[str]:
    """Parameters that are trained under the plan alone: unsharded they are frozen."""
    names = [name for name in expected.after if name not in expected.observed.gradients]
    offs = distances(model, observed.gradients, dict.fromkeys(names))
    return [name for name in names if offs[name]]


def _drifts(model: nn.Module, portion: Portion) -> list[Finding]:
    """Parameters that the ranks along an axis hold alike, and that two steps have left unequal."""
    mesh = portion.mesh
    assert mesh is not None
    findings: list[Finding] = []
    for name, n_ranks in mesh_of(mesh).axes:
        if n_ranks > 1 and role_of(name) is not Role.CUTS_DEPTH:
            group = mesh.get_group(name)
            held = held_alike(model, name, group).items()
            what = "replicated parameters after two steps"
            findings += disagreements(what, held, group, axis=name)
    return findings


def _weight_findings(
    weights: dict[str, float], norm_errors: list[float], alone: list[str], expected: Unsharded
) -> list[Finding]:
    """alone: see _alone(). The gradients that were compared are right."""
    reason = "it has a gradient under the plan, and none unsharded"
    found = [Finding(FindingKind.WEIGHTS_DIFFER, name, reason, weights.get(name)) for name in alone]
    least = max(expected.tolerance, WEIGHTS_TOLERANCE)
    over = [
        name
        for name, off in weights.items()
        if not off <= max(least, expected.weights_allowed.get(name, 0.0)) and name not in alone
    ]
    over.sort(key=lambda name: -weights[name])
    first = next((at for at, off in enumerate(norm_errors, 1) if not off <= expected.tolerance), None)
    if first is None:
        reason = f"after {STEPS} optimizer steps it isn't the unsharded model's"
        return found + [Finding(FindingKind.WEIGHTS_DIFFER, name, reason, weights[name]) for name in over]
    norm = f"the gradients compared are right, and in optimizer step {first} their norm isn't"
    if over:
        norm += f"; after {STEPS} steps the weights differ most in {listed(over)}"
    follows, worst = alone[0] if alone else None, max(norm_errors)
    return [*found, Finding(FindingKind.WEIGHTS_DIFFER, "gradient norm", norm, worst, follows=follows)]
