"""Gradient clipping by the global norm, with one all-reduce of one number per mesh.

Norm = sqrt of the sum over all elements of the whole gradient, each counted once: a rank adds the squares of
its part of a sharded gradient; of a replicated one only the rank at coordinate 0 of the replicated axes does.
torch.nn.utils.clip_grad_norm_ gives the same number with one all-reduce per parameter.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwise.torch_private import foreach_mul_, foreach_norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their global norm is at most max_norm; returns the norm before, a
    scalar tensor.

    Every DTensor gradient must be on one mesh and hold no Partial placement.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mesh = next((gradient.device_mesh for gradient in gradients if isinstance(gradient, DTensor)), None)
    locals_ = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    counted = [
        part
        for gradient, part in zip(gradients, locals_, strict=True)
        if part.numel() and _counts_here(gradient, mesh)
    ]
    dtype = torch.promote_types(locals_[0].dtype, torch.float32)
    squares = torch.zeros((), dtype=dtype, device=locals_[0].device)
    if counted:
        squares = torch.stack([norm.to(dtype) for norm in foreach_norm(counted)]).square().sum()
    if mesh is not None:
        for axis in range(mesh.ndim):
            if mesh.size(axis) > 1:
                dist.all_reduce(squares, group=mesh.get_group(axis))
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the epsilon is torch.nn.utils.clip_grad_norm_'s
    parts = [part for part in locals_ if part.numel()]
    if parts:
        foreach_mul_(parts, scale.to(parts[0].dtype))
    return norm


def _counts_here(gradient: Tensor, mesh: DeviceMesh | None) -> bool:
    if mesh is None:
        return True
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    if not isinstance(gradient, DTensor):
        return not any(coordinate)
    if gradient.device_mesh != mesh or any(placement.is_partial() for placement in gradient.placements):
        raise AssertionError("clip_gradients: gradients on several meshes, or Partial")
    return all(
        place == 0
        for place, placement in zip(coordinate, gradient.placements, strict=True)
        if placement.is_replicate()
    )
