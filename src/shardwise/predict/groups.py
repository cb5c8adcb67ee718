"""Which ranks a collective goes over on the whole mesh: how many there are along its axes, and where they
lie.

A Program is traced on a smaller mesh (traced.py), whose data-parallel axes are rescaled here. Context
ranks that it was traced without join the axis that reduces. What this file does not know: what a collective
costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from shardwise.core.collective import is_off_mesh
from shardwise.core.mesh import Mesh, Role, axes_in, role_of
from shardwise.core.placement import Replicate
from shardwise.core.prediction import Setup
from shardwise.core.program import ONCE, Collective, Holding, Program


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Rank 0's group, by axis: (distance between neighbours, ranks), outermost first."""

    axes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return prod(size for _, size in self.axes)

    @property
    def stride(self) -> int:
        """The least distance between two of its ranks."""
        return min((stride for stride, size in self.axes if size > 1), default=self.axes[-1][0])

    def ranks(self) -> Iterator[int]:
        """In order."""
        for places in product(*(range(0, stride * size, stride) for stride, size in self.axes)):
            yield sum(places)

    def local(self, devices_per_node: int) -> int:
        """Those on one node; nodes are filled in order."""
        near = ((stride, min(size, -(-devices_per_node // stride))) for stride, size in self.axes)
        group = RankGroup(tuple(near))
        return max(1, sum(rank < devices_per_node for rank in group.ranks()))


def mesh_of(program: Program, setup: Setup) -> Mesh:
    """The whole mesh of the step."""
    return setup.mesh or Mesh(program.axes)


def joining_context(program: Program, setup: Setup) -> int:
    """Context ranks that the Program was traced without, which join the axis that reduces."""
    return mesh_of(program, setup).context // Mesh(program.axes).context


def group_of(axis: str, program: Program, setup: Setup) -> RankGroup:
    """Of the collectives over an axis, or joined axes, of the Program's mesh."""
    mesh, traced = mesh_of(program, setup), Mesh(program.axes)
    reducing, wanted = traced.reducing_axis, set(axes_in(axis))
    if reducing in wanted and traced.size(reducing or "") > 1 and joining_context(program, setup) > 1:
        wanted |= {name for name, _ in mesh.axes if role_of(name) is Role.CUTS_SEQUENCE}
    stride, found = 1, []
    for name, size in reversed(mesh.axes):
        if name in wanted:
            found.append((stride, size))
        stride *= size
    return RankGroup(tuple(reversed(found)) or ((1, 1),))


def groups_of(program: Program, setup: Setup) -> dict[str, RankGroup]:
    """Of every axis and every group that the Program's collectives go over. Of ranks that are no axis nobody
    tells how far apart they are, so as far as can be."""
    groups = {name: group_of(name, program, setup) for name, _ in program.axes}
    world = prod(group.size for group in groups.values())
    for block in program.blocks:
        for item in block.items:
            if not isinstance(item, Collective) or item.call.axis in groups:
                continue
            axis, size = item.call.axis, item.call.axis_size
            if is_off_mesh(axis):
                groups[axis] = RankGroup(((max(1, world // size), size),))
            else:
                groups[axis] = group_of(axis, program, setup)
    return groups


def further_shards(program: Program, setup: Setup) -> float:
    """Into how many parts the traced rank's shard of the parameters is cut, where FSDP's axes have more ranks
    than the traced ones."""
    mesh, traced = mesh_of(program, setup), Mesh(program.axes)
    joins = traced.reducing_axis is not None and role_of(traced.reducing_axis) is Role.SHARDS_PARAMETERS
    joining = joining_context(program, setup) if joins and traced.fsdp > 1 else 1
    return mesh.fsdp * joining / traced.fsdp


def end_share(item: Collective, program: Program, setup: Setup) -> float:
    """What a rank of the whole mesh sends of a collective of the step's end, as a share of what the traced
    one does: the gradients of its stage, and, over other axes than FSDP's, of its own shard of them."""
    if item.phase not in ONCE or not item.is_many:
        return 1.0
    shards = 1.0 if role_of(item.call.axis) is Role.SHARDS_PARAMETERS else further_shards(program, setup)
    return 1 / (mesh_of(program, setup).stages * shards)


def optimizer_shards(program: Program, setup: Setup) -> float:
    """Into how many parts a rank's optimizer state is cut (ZeRO-1): of experts that each rank along ep holds
    for itself, so many times fewer than of what they hold alike; on average, by bytes."""
    shards, experts = setup.optimizer_shards, mesh_of(program, setup).size_of(Role.CUTS_EXPERTS)
    if shards == 1 or experts == 1:
        return shards
    whole = kept = 0.0
    for holding in program.holdings:
        parts = max(1, shards // experts) if _is_cut(holding, program.axes) else shards
        whole += holding.optimizer_bytes
        kept += holding.optimizer_bytes / parts
    return whole / kept if kept else shards


def _is_cut(holding: Holding, axes: tuple[tuple[str, int], ...]) -> bool:
    """Whether each rank of the axis of experts holds its own."""
    named = zip(axes, holding.placement, strict=False)
    return any(
        role_of(name) is Role.CUTS_EXPERTS and not isinstance(placement, Replicate)
        for (name, _), placement in named
    )
