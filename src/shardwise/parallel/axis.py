"""Axis: one named axis of a device mesh, as the styles use it; and Site: a module's place in the plan."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.collective import Origin
from shardwise.core.placement import Placement
from shardwise.core.plan import ReduceScatter


@dataclass(frozen=True, slots=True)
class Axis:
    """`mesh` is 1-D. `pairwise_reduce_scatter`: carry a reduce-scatter out as an all-to-all and a local sum."""

    name: str
    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int
    pairwise_reduce_scatter: bool

    @classmethod
    def of(cls, mesh: DeviceMesh, name: str, reduce_scatter: ReduceScatter = ReduceScatter.AUTO) -> "Axis":
        """The axis `name` of a named mesh (the mesh itself where it has that one axis only)."""
        axis_mesh = mesh[name] if mesh.ndim > 1 else mesh
        group = axis_mesh.get_group()
        match reduce_scatter:
            case ReduceScatter.AUTO:
                # gloo's own reduce-scatter sends as much as its all-reduce, twice what is needed
                pairwise = dist.get_backend(group) == "gloo"
            case ReduceScatter.BACKEND:
                pairwise = False
            case ReduceScatter.PAIRWISE:
                pairwise = True
        return cls(name, axis_mesh, group, axis_mesh.get_local_rank(), axis_mesh.size(), pairwise)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a style works: the module's name, the rule that put it there, and the axis."""

    module: str
    rule: str
    axis: Axis

    def origin(self, before: Placement, after: Placement) -> Origin:
        return Origin(self.module, self.rule, before, after)
