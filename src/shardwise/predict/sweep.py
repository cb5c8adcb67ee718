"""What a sweep goes over, and the order of what came out."""

from collections.abc import Iterable

from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.sweep import SweepPoint

DATA_ROLES = (Role.SHARDS_PARAMETERS, Role.REPLICATES)


def meshes(devices: int, devices_per_node: int, context: int = 1) -> tuple[Mesh, ...]:
    """All pp x fsdp or dp x tp of `devices`: tp inside a node and dividing it, the rest any divisors.
    context: ranks that share a sequence, which reduce gradients with the data-parallel ones; devices are a
    multiple of it."""
    every = []
    for tp in _divisors(devices // context):
        if tp > devices_per_node or devices_per_node % tp:
            continue
        for stages in _divisors(devices // context // tp):
            data = devices // context // tp // stages
            needed = {Role.CUTS_DEPTH: stages, Role.CUTS_SEQUENCE: context}
            sizes = {role: size for role, size in needed.items() if size > 1} | {Role.CUTS_TENSORS: tp}
            every += [
                Mesh.of(sizes | ({} if role is None else {role: data}))
                for role in (DATA_ROLES if data * context > 1 else (None,))
            ]
    return tuple(every)


def shares_programs(mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """What meshes have in common that share their Programs: they differ in stages and in the size of the data
    axis."""
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
