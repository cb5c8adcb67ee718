"""What a rank holds of a parameter or gradient, against the whole of it, which every rank has: so only
numbers go between the ranks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardwise.core.mesh import axes_in
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
    the mean of their squares. A name that `tensors` hasn't is of a parameter that this rank hasn't: of
    another stage of a pipeline.

    All ranks call it. None and zeros are the same to every weight; infinite where one side alone has
    something, where no rank has the parameter, or one holds no number.
    """
    squares, holders = [], []
    for name, expected in whole.items():
        holders.append(float(name in tensors))
        tensor = tensors.get(name)
        if name not in tensors:
            squares.append(0.0)
        elif tensor is None or expected is None:
            present = tensor if tensor is not None else expected
            squares.append(0.0 if present is None or not bool(local(present).any()) else float("inf"))
        else:
            squares.append(_square(tensor, expected, model, applied_to(model).row_order.get(name)))
    sums = all_summed([*squares, *holders])
    found = {}
    for (name, expected), square, count in zip(whole.items(), sums, sums[len(whole) :], strict=False):
        is_lost = not count and expected is not None and bool(expected.any())
        found[name] = float("inf") if is_lost else (square / max(count, 1.0)) ** 0.5
    return found


def _square(tensor: Tensor, whole: Tensor, model: nn.Module, order: Order | None) -> float:
    """||s - g||^2 of this rank's part, times the number of parts: its mean over all ranks that hold any is
    the sum over all parts."""
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
    return size(held.double() - whole.double()) ** 2 * n_parts


@torch.no_grad()
def own_distance(
    tensor: Tensor | None, whole: Tensor, model: nn.Module, name: str
) -> tuple[float, float, bool] | None:
    """Of this rank's part of a parameter's tensor: how far it is off the whole's, the size of the whole's,
    and whether there is anything but zeros. None where only all ranks together know what it is."""
    if isinstance(tensor, DTensor) and (_stands_for_whole(tensor, model) or _is_partial(tensor)):
        return None
    if isinstance(tensor, DTensor):
        whole = part_of_dtensor(whole, tensor, applied_to(model).row_order.get(name)).to_local()
    held = local(tensor) if tensor is not None else torch.zeros_like(whole)
    if held.shape != whole.shape:
        return None
    return size(held.double() - whole.double()), size(whole), bool(held.any())


def held_over(tensor: Tensor | None, model: nn.Module, axes: Collection[str]) -> Tensor | None:
    """What a rank would hold if the mesh had these axes only: what is cut over others is gathered. All ranks
    that hold the parameter call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    if _is_partial(tensor):
        return tensor.to_local() if _is_unpromised_part(tensor, model) else tensor.full_tensor()
    names = tensor.device_mesh.mesh_dim_names or ()
    placements = [
        placement if not set(axes).isdisjoint(axes_in(name)) else Replicate()
        for name, placement in zip(names, tensor.placements, strict=True)
    ]
    if all(placement.is_replicate() for placement in placements):
        return tensor.full_tensor()
    if any(isinstance(placement, StridedShard) for placement in tensor.placements):
        return _cut(tensor, placements)
    return tensor.redistribute(placements=placements).to_local()


def _cut(tensor: DTensor, placements: Sequence[Any]) -> Tensor:
    """What a rank holds under these placements, from the whole: FSDP's shards of what tp has cut already are
    strided, and PyTorch gathers none of the two alone."""
    whole, mesh = tensor.full_tensor(), tensor.device_mesh
    for axis, placement in enumerate(placements):
        if not placement.is_replicate():
            pieces, at = whole.chunk(mesh.size(axis), placement.dim), mesh.get_local_rank(axis)
            whole = pieces[at] if at < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


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
