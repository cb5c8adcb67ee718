"""Work: a Program's ops and collectives as columns, each with its cost on a machine, in the order in which
the host issues them.

A block of equal layers is costed once and repeated. Where an item stands in the model tells which stage of a
pipeline runs it: its layer, or before the first one, or after the last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import layer_index
from shardwise.core.machine import Machine
from shardwise.core.mesh import Role, role_of
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import BACKWARDS, Block, Collective, Op, OpKind, Phase, Program
from shardwise.predict.costs import Cost, collective_cost, op_cost
from shardwise.predict.float8 import gathers_float8, is_float8, with_casts
from shardwise.predict.groups import end_share, groups_of, joining_context

TERMS = tuple(Term)
PHASES = tuple(Phase)
BEFORE, AFTER = -1, -2

Seconds = NDArray[np.float64]
# of Work, in the order in which _Costing makes them; what ranks wait for one another isn't an item's
COLUMNS = {
    "device_s": np.float64,
    "host_s": np.float64,
    "term": np.int8,
    "phase": np.int8,
    "axis": np.int8,
    "layer": np.int32,
    "hidden_s": np.float64,
    "template": np.int32,
    "waits_s": np.float64,
}


@dataclass(frozen=True, slots=True)
class Work:
    """Columns, one row an item. axis: 0 for the device's compute stream, else 1 + the index in `axes` of the
    collective's axis. hidden_s: of a ring's shift what the attention beside it hides, which is not in its
    device_s. template: into `items`, whose names the row has, apart from its layer. waits_s: how
    long a rank, on average, waits in a collective for the last one (predict/waiting.py), before the device_s
    of its transfer. together: host and device are one (a CPU), so issuing is part of the item. unknown: ops
    and collectives whose cost nobody knows."""

    device_s: Seconds
    host_s: Seconds
    term: NDArray[np.int8]
    phase: NDArray[np.int8]
    axis: NDArray[np.int8]
    layer: NDArray[np.int32]
    hidden_s: Seconds
    template: NDArray[np.int32]
    waits_s: Seconds
    items: tuple[Op | Collective, ...]
    axes: tuple[str, ...]
    unknown: tuple[str, ...]
    together: bool

    def __len__(self) -> int:
        return len(self.device_s)

    def item(self, row: int) -> Op | Collective:
        """What the row is, of the layer that was traced."""
        return self.items[int(self.template[row])]

    def where(self, chosen: NDArray[np.bool_]) -> "Work":
        """The rows chosen."""
        return self._mapped(lambda column: column[chosen])

    def repeated(self, times: int) -> "Work":
        """All rows, several times over."""
        return self._mapped(lambda column: np.tile(column, times))

    def _mapped(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "Work":
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in COLUMNS}
        return replace(self, **changed)

    def in_phases(self, *phases: Phase) -> NDArray[np.bool_]:
        return np.isin(self.phase, [PHASES.index(phase) for phase in phases])

    def without(self, terms: tuple[Term, ...]) -> "Work":
        """The same with the items of some terms costing nothing: where host and device are one, their issuing
        neither, which is part of them."""
        off = np.isin(self.term, [TERMS.index(term) for term in terms])
        unissued = (off & self.together) | (Term.LAUNCH in terms)
        host_s = np.where(unissued, 0.0, self.host_s)
        device_s, hidden_s = (np.where(off, 0.0, each) for each in (self.device_s, self.hidden_s))
        return replace(self, device_s=device_s, hidden_s=hidden_s, host_s=host_s)

    def reordered(self, order: NDArray[np.int64]) -> "Work":
        """The rows in another order."""
        return self._mapped(lambda column: column[order])

    def with_values(self, values: Mapping[str, float]) -> "Work":
        """The same with these in whole columns."""
        changed: dict[str, Any] = {
            name: np.full_like(getattr(self, name), value) for name, value in values.items()
        }
        return replace(self, **changed)

    @property
    def punctual(self) -> "Work":
        """The same where no rank is late."""
        return replace(self, waits_s=np.zeros_like(self.waits_s))

    def by_term(self) -> dict[Term, float]:
        """The items' own seconds."""
        own_s = self.device_s + (self.host_s if self.together else 0.0)
        return {term: float(own_s[self.term == index].sum()) for index, term in enumerate(TERMS)}


def joined(works: Sequence[Work]) -> Work:
    """The rows of several parts of one step, one after the other."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(work, name) for work in works]) for name in COLUMNS
    }
    return replace(works[0], **columns)


def layers_of(program: Program) -> tuple[str | None, int]:
    """(prefix, number) of the row of equal layers; (None, 0) where there is none."""
    return program.layers or (None, 0)


def boundary_bytes(program: Program) -> int:
    """Of the activation between two layers, as one rank holds it: the first layer's first input of three dims
    or more, as no shard of FSDP's has."""
    prefix = f"{layers_of(program)[0]}.0"
    for op in program.ops():
        if op.module.startswith(prefix) and op.inputs and len(op.inputs[0].shape) > 2:
            spec = op.inputs[0]
            return prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 2)
    return 0


def work_of(program: Program, machine: Machine, setup: Setup) -> Work:
    """All items of one step."""
    if program.engine == "dtensor":
        machine = replace(machine, launch=machine.launch.of_dtensor())
    costing = _Costing(machine, program, setup)
    blocks = [costing.block(block) for block in program.blocks]
    columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    columns.append(np.zeros(len(columns[0])))
    made = {name: column.astype(kind) for (name, kind), column in zip(COLUMNS.items(), columns, strict=True)}
    made["layer"] = _placed(made["layer"], made["phase"])
    return Work(
        **made,
        items=tuple(costing.items),
        axes=tuple(costing.groups),
        unknown=tuple(sorted(costing.unknown)),
        together=machine.device == "cpu",
    )


class _Costing:
    """Makes columns of blocks, and collects the items that they stand for."""

    def __init__(self, machine: Machine, program: Program, setup: Setup) -> None:
        self.machine = machine
        self.program = program
        self.setup = setup
        self.prefix, _ = layers_of(program)
        self.context = joining_context(program, setup)
        self.groups = groups_of(program, setup)
        self.items: list[Op | Collective] = []
        self.unknown: set[str] = set()
        self._streams = {name: 1 + index for index, name in enumerate(self.groups)}

    def block(self, block: Block) -> tuple[NDArray[np.float64], ...]:
        first, rows = len(self.items), []
        shifts = _Shifts(self.machine.device != "cpu")
        for item in with_casts(block.items, self.setup, self.prefix):
            if isinstance(item, Op | Collective):
                cost, axis = self._cost(item)
                index = layer_index(item.module, self.prefix)
                term, phase = TERMS.index(cost.term), PHASES.index(item.phase)
                layer = BEFORE if index is None else index
                rows.append([cost.device_s, cost.host_s, term, phase, axis, layer, 0.0])
                shifts.see(item, rows)
                self.items.append(item)
        table = np.array(rows, np.float64).reshape(-1, 7)
        tiled = np.tile(table, (block.times, 1))
        if block.times > 1:
            shift = np.repeat(np.arange(block.times) * block.stride, len(table))
            tiled[:, 5] += np.where(tiled[:, 5] >= 0, shift, 0)
        template = np.tile(np.arange(first, len(self.items), dtype=np.float64), block.times)
        return (*tiled.T, template)

    def _cost(self, item: Op | Collective) -> tuple[Cost, int]:
        """With the stream on which it runs."""
        if isinstance(item, Op):
            dtype = self.setup.matmul_dtype if is_float8(item, self.setup, self.prefix) else None
            cost = op_cost(item, self.machine, self.setup, self.context, dtype)
            stream, name = 0, item.name
        else:
            axis = item.call.axis
            packed = 0.5 if gathers_float8(item, self.setup, self.prefix) else 1.0
            share = packed * end_share(item, self.program, self.setup)
            cost = collective_cost(item, self.machine, self.setup, self.groups[axis], share)
            stream, name = self._streams[axis], item.call.op
        if not cost.known:
            self.unknown.add(name)
        return cost, stream


class _Shifts:
    """What goes round a ring of ranks while they compute: of a shift what the attention behind it hides,
    where that is the ring's own (the last gradients come home with nothing behind them). A link carries both
    ways at once, so the sending beside the receiving takes nothing more. hides: whether the device does both
    at once."""

    def __init__(self, hides: bool) -> None:
        self._hides = hides
        self._going: list[tuple[int, str, Phase]] = []

    def see(self, item: Op | Collective, rows: list[list[float]]) -> None:
        """An item, whose row is the last one."""
        if isinstance(item, Collective):
            if role_of(item.call.axis) is not Role.CUTS_SEQUENCE:
                return
            if item.call.kind is CollectiveKind.SEND:
                rows[-1][0] = 0.0
            elif item.call.kind is CollectiveKind.RECV:
                self._going.append((len(rows) - 1, item.module, item.phase))
        elif item.kind is OpKind.ATTENTION and self._hides:
            hides_s = rows[-1][0]
            for row, module, phase in self._going:
                if (module, phase) != (item.module, item.phase):
                    continue
                hidden_s = min(rows[row][0], hides_s)
                rows[row][0] -= hidden_s
                rows[row][6] += hidden_s
                hides_s -= hidden_s
            self._going = []


def _placed(layer: NDArray[np.int32], phase: NDArray[np.int8]) -> NDArray[np.int32]:
    """What lies outside the layers is before or after them: in the forward by whether a layer ran already, in
    the backward the reverse."""
    backward = np.isin(phase, [PHASES.index(each) for each in BACKWARDS])
    inside = layer >= 0
    placed = layer.copy()
    for part, early, late in ((~backward, BEFORE, AFTER), (backward, AFTER, BEFORE)):
        rows = np.flatnonzero(part)
        seen = np.cumsum(inside[rows]) > 0
        outside = ~inside[rows]
        placed[rows[outside & ~seen]] = early
        placed[rows[outside & seen]] = late
    return placed
