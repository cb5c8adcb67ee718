"""The process groups of a step: one for each axis of the mesh, and those of axes that a collective goes over
together, which all ranks make alike and at once.

A group is told from others by its name: what a recorder sees is a group, and what people read is an axis.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.errors import MeshError
from shardwise.core.mesh import Mesh, joined
from shardwise.torch_private import flattened


def mesh_of(mesh: DeviceMesh) -> Mesh:
    """The noun of a device mesh. Raises MeshError for axes that aren't ours, or in another order."""
    return Mesh(tuple(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)))


def rank_in(mesh: DeviceMesh) -> int:
    """This rank's number on the mesh, whose last axis changes fastest."""
    rank = 0
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise MeshError("this rank is not on the mesh.")
    for size, index in zip(mesh.shape, coordinate, strict=True):
        rank = rank * size + index
    return rank


def along(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """The 1-D mesh of one axis, or of several together. All ranks must ask for the same."""
    return mesh[names[0]] if len(names) == 1 else flattened(mesh, names, joined(names))


def make_groups(mesh: DeviceMesh) -> dict[tuple[str, ...], dist.ProcessGroup]:
    """The groups of all axes of several ranks, and of the joined ones, by their axes."""
    axes = mesh_of(mesh)
    alone = [(name,) for name, size in axes.axes if size > 1]
    return {names: along(mesh, names).get_group() for names in (*alone, *axes.joined_axes)}


def axis_names(mesh: DeviceMesh) -> dict[str, str]:
    """What axis, or joined ones, each group's name stands for."""
    return {str(group.group_name): joined(names) for names, group in make_groups(mesh).items()}
