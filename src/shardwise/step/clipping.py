"""Gradient clipping by the global norm, with one all-reduce of one number per axis of each mesh.

Norm = sqrt of the sum over all elements of the whole gradient, each counted once: a rank adds the squares of
its part of a sharded gradient; of a replicated one only the rank at coordinate 0 of the replicated axes does.
torch.nn.utils.clip_grad_norm_ gives the same number with one all-reduce per parameter, and takes gradients of
one mesh only: where another library's plan leaves a parameter whole, FSDP puts it on a smaller mesh.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.torch_private import foreach_mul_, foreach_norm


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    stages: dist.ProcessGroup | None = None,
    counted_elsewhere: Collection[nn.Parameter] = (),
) -> Tensor:
    """Scales all gradients in place so that their global norm is at most max_norm; returns the norm before, a
    scalar tensor. stages: ranks that hold other layers; counted_elsewhere: what another of them counts.

    A plain tensor is the same on all ranks of the first mesh. No DTensor gradient may be Partial.
    """
    by_parameter = {each: each.grad for each in parameters if each.grad is not None}
    gradients = list(by_parameter.values())
    squares = sum_of_squares([by_parameter[each] for each in by_parameter if each not in counted_elsewhere])
    if stages is not None:
        dist.all_reduce(squares, group=stages)
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the epsilon is torch.nn.utils.clip_grad_norm_'s
    parts = [part for part in map(_local, gradients) if part.numel()]
    if parts:
        foreach_mul_(parts, scale.to(parts[0].dtype))
    return norm


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Of all elements of the whole gradients, those of each mesh summed over its ranks; a scalar tensor."""
    first = next((each.device_mesh for each in gradients if isinstance(each, DTensor)), None)
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else first
        by_mesh.setdefault(mesh, []).append(gradient)
    return reduce(torch.add, [_squares(own, mesh) for mesh, own in by_mesh.items()])


def _squares(gradients: Sequence[Tensor], mesh: DeviceMesh | None) -> Tensor:
    """The sum of the squares of all elements, over all ranks of the mesh that these are on."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    counted = [
        part for gradient in gradients if (part := _local(gradient)).numel() and _counts_here(gradient, mesh)
    ]
    squares = torch.zeros((), dtype=dtype, device=_local(gradients[0]).device)
    if counted:
        squares = torch.stack([norm.to(dtype) for norm in foreach_norm(counted)]).square().sum()
    if mesh is not None:
        for axis in range(mesh.ndim):
            if mesh.size(axis) > 1:
                dist.all_reduce(squares, group=mesh.get_group(axis))
    return squares


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _counts_here(gradient: Tensor, mesh: DeviceMesh | None) -> bool:
    if mesh is None:
        return True
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    if not isinstance(gradient, DTensor):
        return not any(coordinate)
    if any(placement.is_partial() for placement in gradient.placements):
        raise AssertionError("clip_gradients: a gradient is Partial")
    return all(
        place == 0
        for place, placement in zip(coordinate, gradient.placements, strict=True)
        if placement.is_replicate()
    )
