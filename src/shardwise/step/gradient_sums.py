"""Sums of gradients after the backward, over axes whose ranks see other tokens and hold a parameter alike.

FSDP has summed over its own axes by then, and a plan's styles over those whose ranks see the same tokens.
What a parameter's DTensor says decides: over an axis along which it is cut its ranks hold parts of their own
(experts, which the tokens of all ranks have come to), and nothing is to be summed. One flattened all-reduce
for each set of axes and dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.mesh import axes_in


@dataclass(frozen=True, slots=True)
class GradientSums:
    """axes: those over which a parameter that all ranks hold alike is summed. groups: by axes, outermost
    first, at least those that Mesh.joined_axes names."""

    axes: tuple[str, ...]
    groups: Mapping[tuple[str, ...], dist.ProcessGroup]

    def sum(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients, in place. All ranks that hold these parameters call it."""
        parts: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            axes = self.axes_of(parameter)
            if axes and parameter.grad is not None:
                local = _local(parameter.grad)
                parts.setdefault((axes, local.dtype), []).append(local)
        for (axes, _), tensors in parts.items():
            _sum_flattened(tensors, self.groups[axes])

    def axes_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Those over which its gradient is to be summed: its ranks hold it alike along them."""
        cut = cut_over(parameter)
        return tuple(name for name in self.axes if name not in cut)


def cut_over(parameter: Tensor) -> frozenset[str]:
    """The axes over which its ranks hold parts of their own, as its DTensor says; none of a plain tensor."""
    if not isinstance(parameter, DTensor):
        return frozenset()
    placed = zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
    cut = (name for name, placement in placed if not (placement.is_replicate() or placement.is_partial()))
    return frozenset(axis for name in cut for axis in axes_in(name))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_flattened(parts: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=group)
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))
