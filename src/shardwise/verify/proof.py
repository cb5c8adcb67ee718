"""The proof, on real ranks: the same weights, unsharded against sharded. Outputs, loss and every gradient, then steps of the optimizer.

Every rank runs the unsharded model whole, so what ranks tell each other is a few numbers per parameter. Only where something is wrong do they
exchange what they hold, and run both models once more with an eye on every module: then relation.py says how it is wrong, and reasons.py why.

For a parameter with whole gradient g, a sharded one s, and n what SplitMatmuls makes of it: ||s - g|| must be at most

    max(8 eps G, min(max(1000 ||n - g||, least ||g||), MOST_TOLERANCE ||g||))

with G the norm of all gradients together and eps of the coarsest dtype that the model computes in: below 8 eps G a gradient is rounding (a key's
bias, where softmax takes no notice of it). least: LEAST_TOLERANCE of that dtype. A wrong reduction is off by 1e-2 and more. Outputs and loss
are compared in the same way, without the first term. Where 1000 x noise of the outputs is above MOST_TOLERANCE, nothing can be proved.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.core.errors import RunError
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.plan import Engine
from shardwise.core.shown import told
from shardwise.core.verification import Proof
from shardwise.parallel.apply import applied_to
from shardwise.parallel.loss import Loss, PlainLoss, VocabParallelLoss
from shardwise.parallel.ownership import RowOwnership
from shardwise.parallel.parameters import part_of_dtensor
from shardwise.step.train import TrainStep
from shardwise.torch_private import StridedShard
from shardwise.verify.exchange import all_largest, gathered, gathered_ints, largest
from shardwise.verify.noise import NoDropout
from shardwise.verify.observe import SEED, Call, ModuleError, Observed, local, observe
from shardwise.verify.ranks import disagreements, replicated_parameters
from shardwise.verify.reasons import Evidence, Recut, Seen, explain_differences
from shardwise.verify.relation import cut_apart, relate

MOST_TOLERANCE = 1e-2
LEAST_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: MOST_TOLERANCE,
    torch.float16: MOST_TOLERANCE,
}
STEPS = 2
WEIGHTS_TOLERANCE = 1e-4
"""After the steps, relative: an element of a gradient may be noise where the whole isn't. A wrong norm or a forgotten parameter is off by 1e-2."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Unsharded:
    """What the unsharded model gives, and how sure that is. noise: relative, the largest. tolerance: of outputs and loss, relative. allowed: how
    far each parameter's gradient may be off, absolute. after: its parameters after the steps; norms: gradient norms before clipping."""

    observed: Observed
    noise: float
    tolerance: float
    allowed: dict[str, float]
    max_norm: float
    after: dict[str, Tensor]
    norms: tuple[float, ...]

    def is_told(self, name: str) -> bool:
        """Whether a parameter's gradient is well above its noise. AdamW divides by its size, so that noise would become a whole step."""
        gradient = self.observed.gradients.get(name)
        return gradient is None or self.allowed[name] <= MOST_TOLERANCE * float(gradient.double().norm())


def unsharded(model: nn.Module, batches: Sequence[Batch], parts: int) -> Unsharded:
    """Runs the model whole: once as it is, once with its matmuls split, then with a copy of it STEPS steps of each. The model stays as it is.

    Raises RunError where it can't be run, gives something that isn't finite, or is too noisy.
    """
    first = observe(model, *batches[0])
    gradients = {name: gradient for name, gradient in first.gradients.items() if gradient is not None}
    sizes = [float(gradient.double().norm()) for gradient in gradients.values()]
    total = sum(size**2 for size in sizes) ** 0.5
    if not all(map(_is_finite, (*sizes, first.loss))) or not bool(first.logits.isfinite().all()):
        raise RunError("the unsharded model's outputs or gradients are not finite.")
    if not total:
        raise RunError("the unsharded model has no gradient.")
    split = observe(model, *batches[0], split=max(2, parts))
    dtype = next(model.parameters()).dtype
    coarsest = split.coarsest or dtype
    least, rounding = LEAST_TOLERANCE[coarsest], 8 * torch.finfo(coarsest).eps * total
    output_noise = max(abs(split.loss - first.loss) / abs(first.loss), _relative(split.logits, first.logits))
    noise, allowed = output_noise, {}
    for (name, gradient), own in zip(gradients.items(), sizes, strict=True):
        other = split.gradients[name]
        assert other is not None
        off = float((other.double() - gradient.double()).norm())
        allowed[name] = max(rounding, min(max(1000 * off, least * own), MOST_TOLERANCE * own))
        if off > rounding:
            noise = max(noise, off / own)
    tolerance = max(least, 1000 * output_noise)
    if not tolerance <= MOST_TOLERANCE:
        raise RunError(
            f"the unsharded model differs from itself by {output_noise:.1e} when its matmuls are summed in parts: too much to tell a wrong plan by."
        )
    max_norm = total / 2
    after, norms = _trained(deepcopy(model), batches, None, max_norm)
    return Unsharded(
        first, noise, tolerance, allowed, max_norm, {name: local(p) for name, p in after.items()}, norms
    )


def prove(
    model: nn.Module,
    expected: Unsharded,
    rerun: Callable[[], nn.Module],
    batches: Sequence[Batch],
    mesh: DeviceMesh,
) -> tuple[Proof, tuple[Finding, ...]]:
    """Compares the sharded `model` with what the unsharded one gave. All ranks of the mesh's tp axis must call it; all get the same answer.

    rerun: makes the unsharded model again, with the same weights, where it has to be looked at more closely.
    """
    group = mesh.get_group(TENSOR_AXIS)
    whole = expected.observed
    observed = observe(model, *batches[0], width=whole.logits.shape[-1])
    gradients = _compare_gradients(model, observed, expected, group)
    output_error = _output_error(observed.logits, whole.logits, applied_to(model).loss, group)
    loss_error = largest(abs(observed.loss - whole.loss) / abs(whole.loss), group)
    wrong = {name: error.relative for name, error in gradients.items() if error.is_wrong}
    worst = max(
        gradients,
        key=lambda name: (gradients[name].is_wrong and gradients[name].relative, gradients[name].share),
        default="",
    )
    findings: list[Finding] = []
    norm_error = weights_error = None
    if wrong or not max(output_error, loss_error) <= expected.tolerance:
        evidence = _evidence(model, rerun(), batches[0], wrong, expected, output_error, loss_error, group)
        findings += explain_differences(evidence)
    else:
        trained, norms = _trained(model, batches, mesh, expected.max_norm)
        norm_error = largest(max(abs(a - b) / b for a, b in zip(norms, expected.norms, strict=True)), group)
        told_names = [name for name in trained if expected.is_told(name)]
        errors = [_weight_error(model, name, trained[name], expected.after[name]) for name in told_names]
        weights = dict(zip(told_names, all_largest(errors, group), strict=True))
        weights_error = max(weights.values(), default=0.0)
        findings += _after_steps(weights, weights_error, norm_error, expected.tolerance)
        findings += disagreements(
            "replicated parameters after two steps", replicated_parameters(model).items(), group
        )
    proof = Proof(
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        noise=expected.noise,
        tolerance=expected.tolerance,
        output_error=output_error,
        loss_error=loss_error,
        parameters_compared=len(gradients),
        worst_gradient=worst,
        worst_gradient_error=gradients[worst].relative if worst else 0.0,
        steps=STEPS if weights_error is not None else 0,
        norm_error=norm_error,
        weights_error=weights_error,
    )
    return proof, tuple(findings)


# ------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True, slots=True)
class GradientError:
    """relative: ||s - g|| / ||g||, infinite where one side has none. share: of what is allowed."""

    relative: float
    share: float

    @property
    def is_wrong(self) -> bool:
        return not self.share <= 1


def _compare_gradients(
    model: nn.Module, observed: Observed, expected: Unsharded, group: dist.ProcessGroup
) -> dict[str, GradientError]:
    """By parameter, the largest over the ranks. A gradient of zeros and none at all are the same to every weight."""
    off, own = [], []
    row_order = applied_to(model).row_order
    for name, whole in expected.observed.gradients.items():
        gradient = observed.gradients.get(name)
        own.append(float(whole.double().norm()) if whole is not None else 0.0)
        if gradient is None or whole is None:
            present = gradient if gradient is not None else whole
            off.append(0.0 if present is None or not bool(local(present).any()) else float("inf"))
        else:
            off.append(float((_whole(gradient, model, row_order.get(name)).double() - whole.double()).norm()))
    errors = zip(expected.observed.gradients, all_largest(off, group), own, strict=True)
    return {
        name: _gradient_error(error, size, expected.allowed.get(name, 0.0)) for name, error, size in errors
    }


def _gradient_error(off: float, own: float, allowed: float) -> GradientError:
    return GradientError(
        off / own if own else (float("inf") if off else 0.0),
        off / allowed if allowed else (float("inf") if off else 0.0),
    )


def _whole(tensor: Tensor, model: nn.Module, ownership: RowOwnership | None = None) -> Tensor:
    """The whole tensor of what may be a DTensor. All ranks call it. A Partial gradient of the native engine is taken as it is: it promises none."""
    if not isinstance(tensor, DTensor):
        return tensor
    applied = applied_to(model)
    is_native = applied.plan is not None and applied.plan.engine is Engine.NATIVE
    if is_native and any(placement.is_partial() for placement in tensor.placements):
        return tensor.to_local()
    whole = tensor.full_tensor()
    if ownership is None:
        return whole
    kept = part_of_dtensor(
        torch.arange(len(whole), device=whole.device), _rows(tensor), ownership
    ).full_tensor()
    natural = torch.empty_like(whole)
    natural[kept] = whole
    return natural


def _held(gradient: Tensor | None, model: nn.Module) -> Tensor | None:
    """What this rank has of a gradient. One that is Partial stands for its sum, unless it is the native engine's, which leaves none so."""
    if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
        return _whole(gradient, model)
    return None if gradient is None else local(gradient)


def _rows(tensor: DTensor) -> DTensor:
    """A DTensor of one number a row, cut as the tensor's rows are."""
    flat = tensor.to_local().new_zeros(tensor.to_local().shape[:1], dtype=torch.int64)
    return DTensor.from_local(
        flat, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape[:1], stride=(1,)
    )


def _output_error(logits: Tensor, whole: Tensor, loss: Loss, group: dist.ProcessGroup) -> float:
    """loss: it knows which columns of the whole logits a rank has, which are dealt out where the head is tied to an interleaved table."""
    sizes = gathered_ints(logits.shape[-1], group)
    if isinstance(loss, PlainLoss) or all(size == whole.shape[-1] for size in sizes):
        return largest(_relative(logits, whole), group)
    if sum(sizes) != whole.shape[-1]:
        return float("inf")
    rank = dist.get_rank(group)
    if isinstance(loss, VocabParallelLoss):
        return largest(
            _relative(logits, whole.index_select(-1, loss.ownership.ids_of(rank).to(whole.device))), group
        )
    first = sum(sizes[:rank])
    return largest(_relative(logits, whole.narrow(-1, first, logits.shape[-1])), group)


def _weight_error(model: nn.Module, name: str, parameter: Tensor, whole: Tensor) -> float:
    """On this rank."""
    return _relative(_whole(parameter.detach(), model, applied_to(model).row_order.get(name)), whole)


def _after_steps(
    weights: dict[str, float], worst: float, norm_error: float, tolerance: float
) -> list[Finding]:
    found = []
    if not norm_error <= tolerance:
        found.append(
            Finding(
                FindingKind.WEIGHTS_DIFFER,
                "gradient norm",
                "every gradient is right, and their norm isn't: clipping counts a replicated or sharded parameter in another way",
                norm_error,
            )
        )
    elif not worst <= max(tolerance, WEIGHTS_TOLERANCE):
        name = max(weights, key=lambda each: weights[each])
        found.append(
            Finding(
                FindingKind.WEIGHTS_DIFFER,
                name,
                f"after {STEPS} optimizer steps it isn't the unsharded model's",
                weights[name],
            )
        )
    return found


def _trained(
    model: nn.Module, batches: Sequence[Batch], mesh: DeviceMesh | None, max_norm: float
) -> tuple[dict[str, nn.Parameter], tuple[float, ...]]:
    """The model's parameters after STEPS steps, and the gradient norms before clipping."""
    step = TrainStep(model, mesh=mesh, learning_rate=1e-3, max_norm=max_norm)
    norms = []
    with NoDropout():
        for number in range(STEPS):
            torch.manual_seed(SEED + number)
            try:
                result = step([batches[number % len(batches)]])
            except Exception as error:
                raise ModuleError("", f"a training step raised {told(error)}") from error
            norms.append(float(result.gradient_norm))
    return dict(model.named_parameters()), tuple(norms)


def _relative(found: Tensor, whole: Tensor) -> float:
    if found.shape != whole.shape:
        return float("inf")
    size = float(whole.double().norm())
    return (
        float((found.double() - whole.double()).norm()) / size
        if size
        else float((found.double() - whole.double()).norm())
    )


def _is_finite(value: float) -> bool:
    return value - value == 0


# ------------------------------------------------------------------------------------------ looking closer


def _evidence(
    model: nn.Module,
    whole_model: nn.Module,
    batch: Batch,
    wrong: dict[str, float],
    expected: Unsharded,
    output_error: float,
    loss_error: float,
    group: dist.ProcessGroup,
) -> Evidence:
    """Both models once more, with every module's output and gradient; all ranks' pieces of what is wrong, related to the whole."""
    whole = observe(whole_model, *batch, trail=True)
    sharded = observe(model, *batch, trail=True)
    tolerance = expected.tolerance
    names = list(wrong)
    pieces = gathered([_held(sharded.gradients.get(name), model) for name in names], group)
    gradients = {}
    for at, name in enumerate(names):
        of_whole = whole.gradients[name]
        assert of_whole is not None
        size = float(of_whole.double().norm())
        gradients[name] = relate(
            [each[at] for each in pieces],
            of_whole,
            tolerance=expected.allowed[name] / size if size else tolerance,
        )
    outputs = gathered([sharded.logits], group)
    n_calls = min(gathered_ints(len(sharded.calls), group))
    calls = sharded.calls[:n_calls]
    on_ranks = gathered([each for call in calls for each in (call.output, call.gradient)], group)
    seen = []
    is_same_order = [call.module for call in calls] == [call.module for call in whole.calls[:n_calls]]
    for at, call in enumerate(calls if is_same_order else []):
        other = whole.calls[at]
        output = gradient = None
        if other.output is not None:
            output = relate([each[2 * at] for each in on_ranks], other.output, tolerance=tolerance)
        if other.gradient is not None:
            # gradients that are far smaller than the largest are rounding
            gradient = relate(
                [each[2 * at + 1] for each in on_ranks], other.gradient, tolerance=10 * tolerance
            )
        seen.append(Seen(call.module, output, gradient))
    evidence = Evidence(
        model=model,
        n_ranks=dist.get_world_size(group),
        tolerance=tolerance,
        output=relate([each[0] for each in outputs], whole.logits, tolerance=tolerance)
        if not output_error <= tolerance
        else None,
        output_error=output_error,
        loss_error=loss_error,
        errors=wrong,
        gradients=gradients,
        seen=tuple(seen),
    )
    wrong_call = evidence.first_wrong_output
    if wrong_call is None:
        return evidence
    at = evidence.seen.index(wrong_call)
    return replace(
        evidence,
        recut=_recut(
            model, dict(whole_model.named_parameters()), batch, at, whole.calls[at], tolerance, group
        ),
    )


def _recut(
    model: nn.Module,
    whole: dict[str, Tensor],
    batch: Batch,
    at: int,
    expected: Call,
    tolerance: float,
    group: dist.ProcessGroup,
) -> Recut | None:
    """Cuts each sharded parameter of the first wrong module in another way, for a trial, and looks whether the module is then right."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for own_name, parameter in model.get_submodule(expected.module).named_parameters(recurse=False):
        name = f"{expected.module}.{own_name}"
        if (
            not isinstance(parameter, DTensor)
            or len(parameter.placements) != 1
            or name not in whole
            or expected.output is None
        ):
            continue
        placement, kept = parameter.placements[0], parameter.to_local().detach()
        if not placement.is_shard() and not isinstance(placement, StridedShard):
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        for parts in (2, 3, 1):
            if whole[name].shape[dim] % (parts * n):
                continue
            trial = cut_apart(whole[name].detach(), dim, parts, n, rank)
            if trial.shape != kept.shape or largest(float(not torch.equal(trial, kept)), group) == 0:
                continue
            before = kept.clone()
            with torch.no_grad():
                kept.copy_(trial)
            calls = observe(model, *batch, trail=True).calls
            with torch.no_grad():
                kept.copy_(before)
            pieces = gathered([calls[at].output if at < len(calls) else None], group)
            if relate([each[0] for each in pieces], expected.output, tolerance=tolerance).is_right:
                return Recut(name, parts)
    return None
