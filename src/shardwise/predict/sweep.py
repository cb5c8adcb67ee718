"""What a sweep goes over, and the order of what came out."""

from collections import Counter
from collections.abc import Iterable
from math import prod

from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.sweep import SweepPoint

GIVEN = (Role.CUTS_SEQUENCE, Role.CUTS_EXPERTS)
"""Axes that a sweep takes as they are given."""


def why_no_tensor_ranks(tp: int, devices: int, devices_per_node: int) -> str | None:
    """Why some group of tp ranks wouldn't lie within one node, nodes being filled in order and tp being the
    innermost axis; None where all do."""
    if devices <= devices_per_node or devices_per_node % tp == 0:
        return None
    if tp > devices_per_node:
        return f"tp is more than the {devices_per_node} devices of a node"
    return f"tp doesn't divide the {devices_per_node} devices of a node: a group would lie on two"


def meshes(devices: int, devices_per_node: int, given: Mesh | None = None) -> tuple[Mesh, ...]:
    """All pp x dp x fsdp x tp of `devices` whose tp lies within a node. given: see all_meshes."""
    return tuple(
        mesh
        for mesh in all_meshes(devices, given)
        if why_no_tensor_ranks(mesh.tp, devices, devices_per_node) is None
    )


def over_nodes(devices: int, devices_per_node: int, given: Mesh | None = None) -> Counter[str]:
    """All others, by why they aren't among them."""
    reasons = (why_no_tensor_ranks(mesh.tp, devices, devices_per_node) for mesh in all_meshes(devices, given))
    return Counter(reason for reason in reasons if reason is not None)


def all_meshes(devices: int, given: Mesh | None = None) -> tuple[Mesh, ...]:
    """All pp x dp x fsdp x tp of `devices`. given: the sizes of axes cp and ep, whose product divides the
    devices."""
    kept = {role: given.size_of(role) for role in GIVEN if given is not None and given.size_of(role) > 1}
    left, every = devices // prod(kept.values()), []
    for tp in _divisors(left):
        for stages in _divisors(left // tp):
            sizes = kept | {Role.CUTS_TENSORS: tp} | ({Role.CUTS_DEPTH: stages} if stages > 1 else {})
            every += [Mesh.of(sizes | data) for data in _data_axes(left // tp // stages, bool(kept))]
    return tuple(every)


def _data_axes(ranks: int, joins: bool) -> list[dict[Role, int]]:
    """All ways to have so many data-parallel ranks. joins: whether others reduce with them, so that one rank
    is worth an axis."""
    shards, replicas = Role.SHARDS_PARAMETERS, Role.REPLICATES
    if ranks == 1:
        return [{shards: 1}, {replicas: 1}] if joins else [{}]
    both = [{replicas: ranks // each, shards: each} for each in _divisors(ranks) if 1 < each < ranks]
    return [{shards: ranks}, {replicas: ranks}, *both]


def shares_programs(mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """What meshes have in common that share their Programs: they differ in stages and in the sizes of the
    data axes."""
    data = tuple(axis.name for axis in AXES if axis.splits_batch and axis.name in dict(mesh.axes))
    return data, mesh.tp


def best_first(points: Iterable[SweepPoint]) -> tuple[SweepPoint, ...]:
    """What fits first; each part by throughput, then by memory."""
    return tuple(
        sorted(
            points,
            key=lambda point: (not point.fits, -point.tokens_per_s_per_device, point.memory.device_bytes),
        )
    )


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
