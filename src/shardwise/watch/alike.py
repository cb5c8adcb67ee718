"""Which ranks hold a tensor alike: as its DTensor's placements say, and of plain tensors as the mesh's axes
do, or the user. Names of parameters say nothing.

A plain tensor is whole on its rank, and so held alike along every axis but a pipeline's, unless the user says
otherwise. Inputs are alike along axes whose ranks see the same tokens. A buffer that the forward writes may
hold what it made of a rank's own tokens (running statistics), so it is alike along those axes only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shardwise.core.errors import MeshError
from shardwise.core.mesh import Role, axes_in, role_of
from shardwise.torch_private import root_of

Replicated = str | Sequence[str] | Callable[[str], Sequence[str]] | None


@dataclass(frozen=True, slots=True)
class Alike:
    """Ranks that hold something alike. axes: those of the mesh along which they lie, and sizes of each;
    members: by place, the last axis fastest."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    members: tuple[int, ...]

    def differing(self, values: Sequence[object]) -> tuple[str, ...]:
        """The axes along which the members' values differ. values: one each."""
        found, inner = [], len(values)
        for name, size in zip(self.axes, self.sizes, strict=True):
            inner //= size
            neighbours = (at for at in range(len(values)) if at // inner % size)
            if any(values[at] != values[at - inner] for at in neighbours):
                found.append(name)
        return tuple(name for name in found if name)


@dataclass(frozen=True, slots=True)
class Grid:
    """The ranks of a mesh, and where this one stands. names: of its axes; "" where there is no mesh."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "Grid":
        names = mesh.mesh_dim_names or tuple(f"dim {dim}" for dim in range(mesh.ndim))
        return cls(tuple(names), tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()), dist.get_rank())

    @classmethod
    def without_mesh(cls, ranks: Sequence[int]) -> "Grid":
        return cls(("",), (len(ranks),), tuple(ranks), dist.get_rank())

    def along(self, axes: Sequence[str]) -> Alike | None:
        """The ranks that differ from this one in these axes only; None where it is alone."""
        kept = [name in axes for name in self.names]
        if self.rank not in self.ranks:
            return None
        own = self._place(self.ranks.index(self.rank))
        members = tuple(
            rank
            for at, rank in enumerate(self.ranks)
            if all(is_free or a == b for is_free, a, b in zip(kept, self._place(at), own, strict=True))
        )
        found = [(name, n) for name, n in zip(self.names, self.sizes, strict=True) if name in axes and n > 1]
        if len(members) == 1:
            return None
        return Alike(tuple(name for name, _ in found), tuple(n for _, n in found), members)

    def _place(self, at: int) -> tuple[int, ...]:
        place = []
        for size in reversed(self.sizes):
            at, index = divmod(at, size)
            place.append(index)
        return tuple(reversed(place))


class Layout:
    """Of one model. mesh: all axes; by default that of its DTensors, else of DistributedDataParallel's group,
    else all ranks. replicated: axes along which what is no DTensor is held alike, for all or by name.
    same_input: axes whose ranks see the same. Raises MeshError for axes that the mesh hasn't."""

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | None,
        replicated: Replicated = None,
        same_input: str | Sequence[str] | None = None,
    ) -> None:
        self._found: dict[tuple[Grid, tuple[str, ...]], Alike | None] = {}
        self.grid = _grid(model, mesh)
        self._replicated = replicated
        given = (same_input,) if isinstance(same_input, str) else same_input
        self.same_input = tuple(given) if given is not None else _see_the_same(model, self.grid)
        self._check(self.same_input, "same_input")
        if not callable(replicated):
            self._whole = self._axes_of_plain("")

    def of_weight(self, name: str, tensor: Tensor) -> Alike | None:
        """The ranks that hold this parameter alike; None where this one is alone with it."""
        whole = self._axes_of_plain(name) if callable(self._replicated) else self._whole
        return self._of(tensor, whole)

    def of_buffer(self, name: str, tensor: Tensor, *, is_written: bool) -> Alike | None:
        whole = self._axes_of_plain(name) if callable(self._replicated) else self._whole
        if is_written:
            whole = tuple(axis for axis in whole if axis in self.same_input)
        return self._of(tensor, whole)

    def of_input(self, tensor: Tensor | None = None) -> Alike | None:
        """None for a tensor of which each rank has a part."""
        if isinstance(tensor, DTensor) and not all(each.is_replicate() for each in tensor.placements):
            return None
        return self._along(self.grid, self.same_input)

    def _of(self, tensor: Tensor, whole: tuple[str, ...]) -> Alike | None:
        if not isinstance(tensor, DTensor):
            return self._along(self.grid, whole)
        names = tensor.device_mesh.mesh_dim_names or ()
        own = [axis for name in names for axis in axes_in(name)]
        if own and set(own) <= set(self.grid.names):
            cut = _cut_over(tensor)
            return self._along(
                self.grid, [axis for axis in (*own, *whole) if axis not in cut]
            )  # over axes that its mesh hasn't it is as a plain one is
        grid = Grid.of(tensor.device_mesh)
        free = [name for name, each in zip(grid.names, tensor.placements, strict=True) if each.is_replicate()]
        return self._along(grid, free)

    def _along(self, grid: Grid, axes: Sequence[str]) -> Alike | None:
        key = (grid, tuple(name for name in grid.names if name in axes))
        if key not in self._found:
            self._found[key] = grid.along(key[1])
        return self._found[key]

    def _axes_of_plain(self, name: str) -> tuple[str, ...]:
        given = self._replicated(name) if callable(self._replicated) else self._replicated
        if given is None:
            return tuple(axis for axis in self.grid.names if role_of(axis) is not Role.CUTS_DEPTH)
        axes = (given,) if isinstance(given, str) else tuple(given)
        self._check(axes, "replicated")
        return axes

    def _check(self, axes: Sequence[str], what: str) -> None:
        for axis in axes:
            if axis not in self.grid.names:
                has = ", ".join(f'"{name}"' for name in self.grid.names if name)
                allowed = f"The mesh has {has}." if has else "There is no mesh: give it as mesh=."
                raise MeshError(f'watch: {what} names an axis "{axis}". {allowed}')


def _grid(model: nn.Module, mesh: DeviceMesh | None) -> Grid:
    if mesh is not None:
        return Grid.of(mesh)
    if isinstance(model, DistributedDataParallel):
        return Grid.without_mesh(dist.get_process_group_ranks(model.process_group))
    held = [each.device_mesh for each in model.parameters() if isinstance(each, DTensor)]
    if held:
        return Grid.of(max(map(root_of, held), key=lambda each: prod(each.shape)))
    return Grid.without_mesh(range(dist.get_world_size()))


def _see_the_same(model: nn.Module, grid: Grid) -> tuple[str, ...]:
    """Axes over which tensors are cut that a forward computes with: its ranks work on the same tokens.
    Axes that aren't ours are known by that alone, and only where FSDP isn't, which cuts for memory."""
    ours = tuple(axis for axis in grid.names if role_of(axis) is Role.CUTS_TENSORS)
    if any(role_of(axis) is not None for axis in grid.names):
        return ours
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return ()
    cut = {axis for parameter in model.parameters() for axis in _cut_over(parameter)}
    return tuple(axis for axis in grid.names if axis in cut)


def _cut_over(parameter: Tensor) -> frozenset[str]:
    """The axes over which ranks hold parts of their own, as its DTensor names them."""
    if not isinstance(parameter, DTensor):
        return frozenset()
    placed = zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=False)
    cut = (name for name, placement in placed if not (placement.is_replicate() or placement.is_partial()))
    return frozenset(axis for name in cut for axis in axes_in(name))


def plain_part(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    wait = getattr(held, "wait", None)  # a collective's result that nobody has waited for
    return wait() if callable(wait) else torch.Tensor.detach(held)
