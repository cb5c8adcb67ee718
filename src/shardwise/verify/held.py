"""What a rank holds of a parameter or gradient, against the whole of it, which every rank has: so only
numbers go between the ranks."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardwise.core.plan import Engine
from shardwise.parallel.apply import applied_to
from shardwise.parallel.ownership import Order
from shardwise.parallel.parameters import part_of_dtensor
from shardwise.torch_private import StridedShard
from shardwise.verify.exchange import all_summed


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensor: Tensor) -> float:
    """Its norm, taken in float64."""
    return float(tensor.double().norm())


def relative(tensor: Tensor, whole: Tensor) -> float:
    """How far it is off the whole, by the whole's size; absolute where that is 0, infinite where the shapes
    differ."""
    if tensor.shape != whole.shape:
        return float("inf")
    return size(tensor.double() - whole.double()) / (size(whole) or 1.0)


@torch.no_grad()
def distances(
    model: nn.Module, tensors: Mapping[str, Tensor | None], whole: Mapping[str, Tensor | None]
) -> dict[str, float]:
    """||s - g|| of each parameter's tensor s, over all ranks' parts of it; of a part that several ranks hold,
    the mean of their squares.

    All ranks call it. None and zeros are the same to every weight; infinite where one side alone has
    something, or a rank holds no number.
    """
    squares = []
    for name, expected in whole.items():
        tensor = tensors.get(name)
        if tensor is None or expected is None:
            present = tensor if tensor is not None else expected
            squares.append(0.0 if present is None or not bool(local(present).any()) else float("inf"))
        else:
            squares.append(_square(tensor, expected, model, applied_to(model).row_order.get(name)))
    return {name: square**0.5 for name, square in zip(whole, all_summed(squares), strict=True)}


def _square(tensor: Tensor, whole: Tensor, model: nn.Module, order: Order | None) -> float:
    """||s - g||^2 of this rank's part, over the number of ranks that hold the same one."""
    n_parts = 1
    if isinstance(tensor, DTensor) and _stands_for_whole(tensor, model):
        tensor = tensor.full_tensor()
    elif isinstance(tensor, DTensor) and not _is_unpromised_part(tensor, model):
        for axis, placement in enumerate(tensor.placements):
            n_parts *= 1 if placement.is_replicate() else tensor.device_mesh.size(axis)
        whole = part_of_dtensor(whole, tensor, order).to_local()
    held = local(tensor)
    if held.shape != whole.shape:
        return float("inf")
    return size(held.double() - whole.double()) ** 2 * n_parts / dist.get_world_size()


def held_over_tp(tensor: Tensor | None, model: nn.Module) -> Tensor | None:
    """What the ranks of this one's data-parallel group hold together, so what a rank of tp alone would hold.
    All ranks call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    if _is_partial(tensor):
        return tensor.to_local() if _is_unpromised_part(tensor, model) else tensor.full_tensor()
    *outer, inner = tensor.placements
    return tensor.redistribute(placements=[*(Replicate() for _ in outer), inner]).to_local()


def _is_partial(tensor: DTensor) -> bool:
    return any(placement.is_partial() for placement in tensor.placements)


def _is_unpromised_part(tensor: DTensor, model: nn.Module) -> bool:
    """A Partial gradient of the native engine, which promises none: it is taken as it is, and differs.
    Others' stand for their sum."""
    plan = applied_to(model).plan
    return _is_partial(tensor) and plan is not None and plan.engine is Engine.NATIVE


def _stands_for_whole(tensor: DTensor, model: nn.Module) -> bool:
    """Whether only all ranks together know what it is: a sum, or several weights in one, each cut by
    itself."""
    is_strided = tensor.device_mesh.ndim == 1 and isinstance(tensor.placements[0], StridedShard)
    return is_strided or (_is_partial(tensor) and not _is_unpromised_part(tensor, model))
