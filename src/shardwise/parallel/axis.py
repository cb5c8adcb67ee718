"""Axis: one named axis of a device mesh, as the styles use it; and Site: a module's place in the plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.collective import Origin
from shardwise.core.placement import Placement
from shardwise.core.plan import ReduceScatter
from shardwise.core.rule import RuleRef


@dataclass(frozen=True, slots=True)
class Target:
    """The device type and the process group's backend for which styles choose their way."""

    device_type: str
    backend: str


_target: ContextVar[Target | None] = ContextVar("target", default=None)


@contextmanager
def as_if_on(target: Target) -> Iterator[None]:
    """Models that are sharded inside choose their way for `target`, whatever the mesh is made of: for tracing
    without that device."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


@dataclass(frozen=True, slots=True)
class Axis:
    """`mesh` is 1-D. `pairwise_reduce_scatter`: carry one out as an all-to-all and a local sum."""

    name: str
    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int
    device_type: str
    pairwise_reduce_scatter: bool

    @classmethod
    def of(cls, mesh: DeviceMesh, name: str, reduce_scatter: ReduceScatter = ReduceScatter.AUTO) -> "Axis":
        """The axis `name` of a named mesh (the mesh itself where it has that one axis only)."""
        axis_mesh = mesh[name] if mesh.ndim > 1 else mesh
        group = axis_mesh.get_group()
        target = _target.get() or Target(axis_mesh.device_type, dist.get_backend(group))
        match reduce_scatter:
            case ReduceScatter.AUTO:
                # gloo's own reduce-scatter sends as much as its all-reduce, twice what is needed
                pairwise = target.backend == "gloo"
            case ReduceScatter.BACKEND:
                pairwise = False
            case ReduceScatter.PAIRWISE:
                pairwise = True
        return cls(
            name, axis_mesh, group, axis_mesh.get_local_rank(), axis_mesh.size(), target.device_type, pairwise
        )

    @property
    def mesh_name(self) -> str:
        """What the mesh calls it, which may be someone else's."""
        return (self.mesh.mesh_dim_names or (self.name,))[0]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a style works: the module's name, the rule that put it there, and the axis."""

    module: str
    rule: RuleRef
    axis: Axis

    def origin(self, before: Placement, after: Placement) -> Origin:
        return Origin(self.module, self.rule, before, after)
