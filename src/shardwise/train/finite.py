"""A loss or a gradient that isn't finite: where it comes from.

The weights are still those that gave it, for a step is checked before its update. So its gradients are
computed once more, with an eye on every module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.errors import NotFiniteError
from shardwise.parallel.stages import stage_of
from shardwise.step.train import StepResult
from shardwise.torch_private import tree_flatten


class _Found(Exception):  # noqa: N818  # no error of a user's: the loop makes one of it
    """A step whose loss or norm isn't finite."""

    def __init__(self, loss: float, norm: float) -> None:
        super().__init__()
        self.loss, self.norm = loss, norm


def check(result: StepResult) -> None:
    """For TrainStep: stops a step before its update. Waits for a GPU."""
    loss, norm = float(result.loss), float(result.gradient_norm)
    if not isfinite(loss) or not isfinite(norm):
        raise _Found(loss, norm)


def guarded(
    step: Callable[[], StepResult], again: Callable[[], Tensor], model: nn.Module, number: int
) -> StepResult:
    """The step, or NotFiniteError that says in which rank and module it goes wrong. again: computes its
    gradients once more."""
    try:
        return step()
    except _Found as found:
        what = "loss" if not isfinite(found.loss) else "gradient norm"
        value = found.loss if what == "loss" else found.norm
        raise NotFiniteError(
            f"step {number}: the {what} is {value}. {_source(model, again)} Nothing was updated; the last "
            "checkpoint is as it was. Lower --learning-rate, or look at the data of this step."
        ) from None


@dataclass(frozen=True, slots=True)
class _Place:
    """part: of a pipeline, counted in the order of the pass; order: of calls in it, -1 where a rank saw
    nothing."""

    part: int
    order: int
    rank: int
    module: str


def _source(model: nn.Module, again: Callable[[], Tensor]) -> str:
    """In a sentence, alike on all ranks."""
    seen: dict[int, tuple[int, int, str]] = {}  # the first of each part: parts take turns over micro-batches
    calls, stage = 0, stage_of(model)

    def look(name: str) -> Callable[..., None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            part = stage.part_at(name) if stage is not None else 0
            if part not in seen and not all(map(_all_finite, tree_flatten(output)[0])):
                seen[part] = part, calls, name

        return after

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if not _holds(module)
    ]
    try:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.compiler.set_stance("force_eager"):  # what was compiled before calls no hooks
            again()
    finally:
        for hook in hooks:
            hook.remove()
    rank = dist.get_rank() if dist.is_initialized() else 0
    forward = _first(_place(sorted(seen.values()), rank))
    if forward is not None:
        return (
            f"In the forward {forward.module} on rank {forward.rank} is the first whose output isn't finite."
        )
    backward = _first(_place(not_finite(model), rank))
    if backward is not None:
        return (
            f"The forward is finite; in the backward {backward.module} on rank {backward.rank} is the first "
            "whose gradient isn't."
        )
    return "Computed once more it is finite, so it doesn't come from the weights and the batch alone."


def not_finite(model: nn.Module) -> list[tuple[int, int, str]]:
    """(part, order, module) of the parameters that this rank holds whose gradient isn't finite, in the order
    of the backward: from the model's end to its beginning, for what isn't finite spreads."""
    stage = stage_of(model)
    names = [name for name, each in model.named_parameters() if each.grad is not None]
    modules = [name.rpartition(".")[0] or name for name in names]
    return sorted(
        (-stage.part_of(module) if stage is not None else 0, len(names) - at, module)
        for at, (name, module) in enumerate(zip(names, modules, strict=True))
        if not _all_finite(model.get_parameter(name).grad)
    )


def _place(seen: Sequence[tuple[int, int, str]], rank: int) -> _Place:
    if not seen:
        return _Place(0, -1, rank, "")
    part, order, module = seen[0]
    return _Place(part, order, rank, module)


def _first(own: _Place) -> _Place | None:
    """The earliest over all ranks."""
    places = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (own.part, own.order, own.rank, own.module))
        places = [_Place(*each) for each in everyone]
    return min(
        (each for each in places if each.order >= 0),
        key=lambda each: (each.part, each.order, each.rank),
        default=None,
    )


def _holds(module: nn.Module) -> bool:
    """Whether a module only calls others: of those the innermost says more."""
    return any(True for _ in module.children())


def _all_finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(local).all())
