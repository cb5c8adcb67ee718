"""Work: a Program's ops and collectives as columns, each with its cost on a machine, in the order in which
the host issues them.

A block of equal layers is costed once and repeated. Where an item stands in the model tells which stage of a
pipeline runs it: its layer, or before the first one, or after the last.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import is_off_mesh
from shardwise.core.machine import Machine
from shardwise.core.mesh import SHARDS_AXIS, Mesh
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import Block, Collective, Op, Phase, Program, layer_index
from shardwise.predict.costs import collective_cost, op_cost

TERMS = tuple(Term)
PHASES = tuple(Phase)
BEFORE, AFTER = -1, -2

Seconds = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """Columns, one row an item. axis: 0 for the device's compute stream, else 1 + the index in `axes` of the
    collective's axis. template: into `items`, whose names the row has, apart from its layer."""

    device_s: Seconds
    host_s: Seconds
    term: NDArray[np.int8]
    phase: NDArray[np.int8]
    axis: NDArray[np.int8]
    layer: NDArray[np.int32]
    template: NDArray[np.int32]
    items: tuple[Op | Collective, ...]
    axes: tuple[str, ...]
    unknown: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.device_s)

    def where(self, chosen: NDArray[np.bool_]) -> "Work":
        """The rows chosen."""
        return self.mapped(lambda column: column[chosen])

    def repeated(self, times: int) -> "Work":
        """All rows, several times over."""
        return self.mapped(lambda column: np.tile(column, times))

    def mapped(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "Work":
        """Every column changed in the same way."""
        return replace(
            self,
            device_s=change(self.device_s),
            host_s=change(self.host_s),
            term=change(self.term),
            phase=change(self.phase),
            axis=change(self.axis),
            layer=change(self.layer),
            template=change(self.template),
        )

    def in_phases(self, *phases: Phase) -> NDArray[np.bool_]:
        return np.isin(self.phase, [PHASES.index(phase) for phase in phases])


def mesh_of(program: Program, setup: Setup) -> Mesh:
    """The whole mesh of the step."""
    return setup.mesh or Mesh(program.axes)


def groups_off_mesh(program: Program) -> dict[str, int]:
    """Groups that are no axis of the mesh, and their sizes."""
    calls = (item.call for block in program.blocks for item in block.items if isinstance(item, Collective))
    return {call.axis: call.axis_size for call in calls if is_off_mesh(call.axis)}


def group_sizes(program: Program, setup: Setup) -> dict[str, int]:
    """Ranks over which the collectives of each of the Program's axes go: context ranks join the axis that
    reduces."""
    mesh, traced = mesh_of(program, setup), Mesh(program.axes)
    sizes = {name: mesh.size(name) for name, _ in program.axes}
    axis = traced.reducing_axis
    if axis is not None and traced.size(axis) > 1:
        sizes[axis] *= mesh.context
    return sizes


def further_shards(program: Program, setup: Setup) -> float:
    """Into how many parts the traced rank's shard of the parameters is cut, where FSDP's axis is larger than
    the traced one."""
    return group_sizes(program, setup).get(SHARDS_AXIS, 1) / Mesh(program.axes).fsdp


def work_of(program: Program, machine: Machine, setup: Setup) -> Work:
    """All items of one step."""
    axes = tuple(name for name, _ in program.axes)
    sizes = group_sizes(program, setup)
    strides, stride = {}, 1
    for name in reversed(axes):
        strides[name] = stride
        stride *= sizes[name]
    for name, size in groups_off_mesh(
        program
    ).items():  # nobody tells how far apart its ranks are: as far as can be
        axes = (*axes, name)
        sizes[name], strides[name] = size, max(1, stride // size)
    prefix = program.layers[0] if program.layers is not None else None
    if program.engine == "dtensor":
        machine = replace(machine, launch=machine.launch.of_dtensor())
    rows: list[tuple[NDArray[np.float64], ...]] = []
    items: list[Op | Collective] = []
    unknown: set[str] = set()
    for block in program.blocks:
        columns, kept, strange = _block(block, prefix, machine, setup, axes, strides, sizes, len(items))
        rows.append(columns)
        items.extend(kept)
        unknown |= strange
    device, host, term, phase, axis, layer, template = (
        np.concatenate(column) for column in zip(*rows, strict=True)
    )
    return Work(
        device,
        host,
        term.astype(np.int8),
        phase.astype(np.int8),
        axis.astype(np.int8),
        _placed(layer.astype(np.int32), phase),
        template.astype(np.int32),
        tuple(items),
        axes,
        tuple(sorted(unknown)),
    )


def _block(
    block: Block,
    prefix: str | None,
    machine: Machine,
    setup: Setup,
    axes: tuple[str, ...],
    strides: dict[str, int],
    sizes: dict[str, int],
    first: int,
) -> tuple[tuple[NDArray[np.float64], ...], list[Op | Collective], set[str]]:
    rows, kept, unknown = [], [], set()
    for item in block.items:
        if isinstance(item, Op):
            cost, axis = op_cost(item, machine, setup), 0
            if not cost.known:
                unknown.add(item.name)
        elif isinstance(item, Collective):
            name = item.call.axis
            cost, axis = (
                collective_cost(
                    item, machine, setup, strides.get(name, 1), sizes.get(name, item.call.axis_size)
                ),
                1 + axes.index(name),
            )
            if not cost.known:
                unknown.add(item.call.op)
        else:
            continue
        index = layer_index(item.module, prefix)
        rows.append(
            (
                cost.device_s,
                cost.host_s,
                TERMS.index(cost.term),
                PHASES.index(item.phase),
                axis,
                BEFORE if index is None else index,
            )
        )
        kept.append(item)
    table = np.array(rows, np.float64).reshape(-1, 6)
    tiled = np.tile(table, (block.times, 1))
    if block.times > 1:
        shift = np.repeat(np.arange(block.times) * block.stride, len(table))
        tiled[:, 5] += np.where(tiled[:, 5] >= 0, shift, 0)
    template = np.tile(np.arange(first, first + len(kept), dtype=np.float64), block.times)
    return (*tiled.T, template), kept, unknown


def _placed(layer: NDArray[np.int32], phase: NDArray[np.float64]) -> NDArray[np.int32]:
    """What lies outside the layers is before or after them: in the forward by whether a layer ran already, in
    the backward the reverse."""
    backward = np.isin(phase, [PHASES.index(each) for each in (Phase.BACKWARD, Phase.RECOMPUTE)])
    inside = layer >= 0
    placed = layer.copy()
    for part, early, late in ((~backward, BEFORE, AFTER), (backward, AFTER, BEFORE)):
        rows = np.flatnonzero(part)
        seen = np.cumsum(inside[rows]) > 0
        outside = ~inside[rows]
        placed[rows[outside & ~seen]] = early
        placed[rows[outside & seen]] = late
    return placed
