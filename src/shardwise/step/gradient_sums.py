"""Sums of gradients after the backward, over axes whose ranks see other tokens and hold a parameter alike.

FSDP has summed over its own axes by then, those of its replicas too, and a plan's styles over those whose
ranks see the same tokens. What a parameter's DTensor says decides: over an axis along which it is cut its
ranks hold parts of their own (experts, which the tokens of all ranks have come to), and nothing is to be
summed. One flattened all-reduce for each set of axes and dtype.
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

    def sum(
        self, parameters: Iterable[nn.Parameter], summed_over: Iterable[tuple[Tensor, dist.ProcessGroup]] = ()
    ) -> None:
        """Sums the gradients, in place. All ranks that hold these parameters call it. summed_over: groups
        over which FSDP has summed some of them, beside those of their shards."""
        parts: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
        groups = {id(parameter): group for parameter, group in summed_over}
        for parameter in parameters:
            summed = groups.get(id(parameter))
            axes = tuple(each for each in self.axes_of(parameter) if not self._is_among(each, summed))
            if axes and parameter.grad is not None:
                local = _local(parameter.grad)
                parts.setdefault((axes, local.dtype), []).append(local)
        for (axes, _), tensors in parts.items():
            _sum_flattened(tensors, self.groups[axes])

    def axes_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Those over which its gradient is to be summed: its ranks hold it alike along them."""
        return tuple(name for name in self.axes if not is_cut_over(parameter, name, self.groups.get((name,))))

    def _is_among(self, axis: str, summed: dist.ProcessGroup | None) -> bool:
        """Whether the ranks along an axis are among those over which FSDP has summed."""
        own = self.groups.get((axis,))
        return summed is not None and own is not None and _share_ranks(own, summed)


def is_cut_over(parameter: Tensor, axis: str, group: dist.ProcessGroup | None) -> bool:
    """Whether the ranks along an axis, which are the group's, hold parts of their own, as its DTensor says;
    those of a plain tensor don't. A mesh of others may call the axis by another name: then its ranks tell."""
    if not isinstance(parameter, DTensor):
        return False
    mesh = parameter.device_mesh
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate() or placement.is_partial():
            continue
        if axis in axes_in((mesh.mesh_dim_names or ("",) * mesh.ndim)[dim]):
            return True
        if group is not None and _share_ranks(group, mesh.get_group(dim)):
            return True
    return False


def _share_ranks(one: dist.ProcessGroup, other: dist.ProcessGroup) -> bool:
    """Whether more than this rank is in both."""
    ranks = set(dist.get_process_group_ranks(one))
    return len(ranks.intersection(dist.get_process_group_ranks(other))) > 1


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_flattened(parts: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=group)
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))
