"""Which placement a collective turns into which, where the native engine doesn't say: DTensor's
redistributions are watched, and a framework may tell its own (models/self_sharded.py)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.mesh import Mesh, Role, axes_in, role_of
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.torch_private import REDISTRIBUTIONS

Change = tuple[Placement | None, Placement | None]


class Redistributions:
    """The redistribution that DTensor is at, if it is at one."""

    def __init__(self) -> None:
        self._specs: tuple[Any, Any] | None = None
        self._told: Change | None = None

    def change(self, call: CollectiveCall) -> Change:
        """(before, after); what nobody told, but what the collective is, says a part of it."""
        if self._specs is not None:
            before, after = (_on_axis(spec, call.axis) for spec in self._specs)
            if before is not None and after is not None:
                return before, after
        if self._told is not None:
            return self._told
        match call.kind, role_of(call.axis):
            case CollectiveKind.ALL_REDUCE, _:
                return Partial(), Replicate()
            case CollectiveKind.ALL_GATHER, Role.SHARDS_PARAMETERS:
                return Shard(0), Replicate()
            case CollectiveKind.REDUCE_SCATTER, Role.SHARDS_PARAMETERS:
                return Partial(), Shard(0)
            case _:
                return None, None

    @contextmanager
    def changing(self, before: Placement, after: Placement) -> Iterator[None]:
        """Inside, a collective turns one into the other along its axis, as who issues it says."""
        told, self._told = self._told, (before, after)
        try:
            yield
        finally:
            self._told = told

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name in REDISTRIBUTIONS:
                stack.enter_context(patch.object(owner, name, self._watched(getattr(owner, name))))
            yield

    def _watched(self, original: Any) -> Any:
        def redistribute(local: Tensor, current: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            before, self._specs = self._specs, (current, target)
            try:
                return original(local, current, target, *args, **kwargs)
            finally:
                self._specs = before

        return redistribute


def placements_on(mesh: Mesh, tensor: Tensor) -> tuple[Placement, ...]:
    """By axis of the mesh, of joined ones the same; what is no DTensor is Replicate on all of them."""
    if not isinstance(tensor, DTensor):
        return (Replicate(),) * len(mesh.axes)
    names = tensor.device_mesh.mesh_dim_names or ()
    placements = zip(names, map(from_torch, tensor.placements), strict=True)
    by_axis = {axis: placement for name, placement in placements for axis in axes_in(name)}
    return tuple(by_axis.get(name, Replicate()) for name, _ in mesh.axes)


def _on_axis(spec: Any, axis: str) -> Placement | None:
    names = spec.mesh.mesh_dim_names or ()
    return from_torch(spec.placements[names.index(axis)]) if axis in names else None


def from_torch(placement: Any) -> Placement:
    """PyTorch's placement as ours; what is cut in an order of its own is a Shard here, and every kind of
    partial value is Partial."""
    if placement.is_replicate():
        return Replicate()
    if placement.is_partial():
        return Partial()
    return Shard(placement.dim)
