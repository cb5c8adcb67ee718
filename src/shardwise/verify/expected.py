"""What the unsharded model gives, and how far a right plan may be off it: measured on the model itself.

For a parameter with whole gradient g, and n what SplitMatmuls makes of it, a sharded one s may be off by

    max(8 eps G, min(max(1000 ||n - g||, least ||g||), MOST_TOLERANCE ||g||))

with G the norm of all gradients together and eps of the coarsest dtype that the model computes in: below 8
eps G a gradient is rounding (a key's bias, where softmax takes no notice of it). least: LEAST_TOLERANCE of
that dtype. A wrong reduction is off by 1e-2 and more. Outputs and loss are compared in the same way, without
the first term. Where 1000 x noise of the outputs is above MOST_TOLERANCE, nothing can be proved.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor, nn

from shardwise.core.errors import RunError
from shardwise.core.shown import told
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.verify.held import local, relative, size
from shardwise.verify.noise import NoDropout
from shardwise.verify.observe import ALONE, SEED, Batch, ModuleError, Observed, micro_batches, observe

MOST_TOLERANCE = 1e-2
LEAST_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: MOST_TOLERANCE,
    torch.float16: MOST_TOLERANCE,
}
STEPS = 2


class TooNoisyError(RunError):
    """What rounding does to the unsharded model is as much as a wrong plan may show."""


@dataclass(frozen=True, slots=True)
class Unsharded:
    """What the unsharded model gives, and how sure that is. batches: the first is compared; the steps take
    all of them in turn.

    noise: relative, the largest. tolerance: of outputs and loss, relative. allowed: how far each parameter's
    gradient may be off, absolute. norms: gradient norms before clipping, one for each optimizer step; after:
    the parameters after them. Both are empty without steps. portion: how one process takes the batches.
    weights_allowed: how far each may then be off, relative, where rounding does more than the tolerance
    (rounded.py).
    """

    observed: Observed
    batches: Sequence[Batch]
    noise: float
    tolerance: float
    allowed: dict[str, float]
    max_norm: float
    after: dict[str, Tensor]
    norms: tuple[float, ...]
    portion: Portion = ALONE
    weights_allowed: Mapping[str, float] = field(default_factory=dict)

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """Parameters that the batch trains nothing of: a branch that it doesn't take, a module not used."""
        gradients = self.observed.gradients.items()
        return tuple(name for name, each in gradients if each is None or not bool(each.any()))

    def is_told(self, name: str) -> bool:
        """Whether a parameter's gradient is well above its noise. AdamW divides by its size, so that noise
        would become a whole step."""
        if name in self.weights_allowed:
            return True
        gradient = self.observed.gradients.get(name)
        return gradient is None or self.allowed[name] <= MOST_TOLERANCE * size(gradient)


@dataclass(frozen=True, slots=True)
class GradientError:
    """relative: ||s - g|| / ||g||, infinite where one side has none. share: of what is allowed."""

    relative: float
    share: float

    @property
    def is_wrong(self) -> bool:
        return not self.share <= 1


@dataclass(frozen=True, slots=True)
class Differences:
    """How far a sharded model is off, the largest over the ranks. output, loss: relative, and right up to
    `tolerance`."""

    output: float
    loss: float
    gradients: dict[str, GradientError]
    tolerance: float

    @property
    def are_wrong(self) -> bool:
        return self.is_output_wrong or self.is_loss_wrong or bool(self.wrong_gradients)

    @property
    def is_output_wrong(self) -> bool:
        return not self.output <= self.tolerance

    @property
    def is_loss_wrong(self) -> bool:
        return not self.loss <= self.tolerance

    @property
    def wrong_gradients(self) -> dict[str, float]:
        """By parameter, how far off."""
        return {name: error.relative for name, error in self.gradients.items() if error.is_wrong}

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter that is furthest off, and how far; where none is wrong, the one that is nearest to
        what is allowed. Rounding, which may be as large as a gradient that is nothing else, counts by its
        share of what is allowed: so right is what is within the tolerance."""
        if not self.gradients:
            return "", 0.0
        by_error = {
            name: (error.is_wrong and error.relative, error.share) for name, error in self.gradients.items()
        }
        name = max(by_error, key=lambda each: by_error[each])
        worst = self.gradients[name]
        return name, worst.relative if worst.is_wrong else min(worst.relative, worst.share * self.tolerance)


@torch.no_grad()
def shake(name: str, whole: Tensor) -> None:
    """Adds noise to a parameter's weights, the same on every rank: a norm that is all ones, or a bias of
    zeros, has a gradient that a wrong plan can get right."""
    generator = torch.Generator(whole.device).manual_seed(crc32(name.encode()))
    std = min(0.1, whole.shape[-1] ** -0.5) if whole.dim() > 1 else 0.1
    noise = torch.empty(whole.shape, dtype=torch.float32, device=whole.device).normal_(
        0, std, generator=generator
    )
    whole.add_(noise.to(whole.dtype))


def unsharded(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    parts: int,
    portion: Portion = ALONE,
    with_steps: bool = True,
) -> Unsharded:
    """Runs the model whole: once as it is, once with its matmuls split, then STEPS optimizer steps of a copy.
    The model stays as it is. portion: of one process.

    Raises RunError where it can't be run, gives something that isn't finite, or is too noisy.
    """
    first = observe(model, batches[0], portion)
    gradients = {name: gradient for name, gradient in first.gradients.items() if gradient is not None}
    sizes = {name: size(gradient) for name, gradient in gradients.items()}
    total = sum(each**2 for each in sizes.values()) ** 0.5
    if not _is_finite(total) or not _is_finite(first.loss) or not bool(first.own_logits.isfinite().all()):
        raise RunError("the unsharded model's outputs or gradients are not finite.")
    if not total:
        raise RunError("the unsharded model has no gradient.")
    split = observe(model, batches[0], portion, split=max(2, parts))
    coarsest = split.coarsest or next(model.parameters()).dtype
    least, rounding = LEAST_TOLERANCE[coarsest], 8 * torch.finfo(coarsest).eps * total
    output_noise = max(
        abs(split.loss - first.loss) / abs(first.loss), relative(split.own_logits, first.own_logits)
    )
    noise, allowed = output_noise, {}
    for name, gradient in gradients.items():
        own, other = sizes[name], split.gradients[name]
        assert other is not None
        off = size(other.double() - gradient.double())
        allowed[name] = max(rounding, min(max(1000 * off, least * own), MOST_TOLERANCE * own))
        if off > rounding:
            noise = max(noise, off / own)
    tolerance = max(least, 1000 * output_noise)
    if not tolerance <= MOST_TOLERANCE:
        raise TooNoisyError(
            f"the unsharded model differs from itself by {output_noise:.1e} when its matmuls are summed in "
            "parts: too much to tell a wrong plan by."
        )
    max_norm = total / 2
    after, norms = trained(_copied(model), batches, portion, max_norm) if with_steps else ({}, ())
    weights = {name: local(parameter) for name, parameter in after.items()}
    return Unsharded(first, batches, noise, tolerance, allowed, max_norm, weights, norms, portion)


def trained(
    model: nn.Module, batches: Sequence[Batch], portion: Portion, max_norm: float
) -> tuple[dict[str, nn.Parameter], tuple[float, ...]]:
    """The model's parameters after STEPS steps, and the gradient norms before clipping."""
    step = TrainStep(
        model, mesh=portion.mesh, learning_rate=1e-3, max_norm=max_norm, reduce_once=portion.reduce_once
    )
    norms = []
    with NoDropout():
        for number in range(STEPS):
            torch.manual_seed(SEED + number)
            try:
                result = step(micro_batches(batches[number % len(batches)], model, portion))
            except Exception as error:
                raise ModuleError("", f"a training step raised {told(error)}") from error
            norms.append(float(result.gradient_norm))
    return dict(model.named_parameters()), tuple(norms)


def _copied(model: nn.Module) -> nn.Module:
    """A copy, of what a forward left in the model, too (a recurrence's last state), which has a graph."""
    held = (each for module in model.modules() for each in vars(module).values())
    left = [each for each in held if isinstance(each, torch.Tensor) and not each.is_leaf]
    return deepcopy(model, {id(each): each.detach().clone() for each in left})


def _is_finite(value: float) -> bool:
    return value - value == 0
