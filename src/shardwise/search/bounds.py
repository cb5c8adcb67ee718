"""Bounds: what a step takes, and what a device holds, at least. From one traced piece, for any mesh that
it can be rescaled to, in microseconds: so that most candidates need no prediction.

step      the busiest stage's micro-batches, in each the longer of the device's work in order, the host's
issuing, and FSDP's collectives beside it; the way of the first micro-batch to the last stage and back; the
step's end memory    a mean stage's states, and the activations of as many micro-batches as its schedule
holds at least

Each is what predict counts, less what it adds: waiting that doesn't add up layer by layer, what
collectives beside the work slow down, what comes and goes. A piece bounds those that only add work to it:
of a root also every recompute and data axis (Piece.root)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.machine import Machine
from shardwise.core.mesh import REPLICAS_AXIS, Mesh, Role, role_of
from shardwise.core.prediction import Precision, Setup, Term
from shardwise.core.program import (
    BACKWARDS,
    FORWARDS,
    IN_LAYERS,
    ONCE,
    Collective,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    OpKind,
    Phase,
    Program,
)
from shardwise.predict.costs import collective_cost, collective_s
from shardwise.predict.groups import RankGroup, end_share, group_of
from shardwise.predict.memory import OF_MASTER
from shardwise.predict.work import AFTER, BEFORE, TERMS, boundary_bytes, layers_of, work_of

SURELY = 0.9
"""Of a layer's forward, what a recompute surely runs again: it ends with what the backward needs."""
MOST_FREED = 2.0
"""An allocator gives back at most so many times what tensors free: what lay between them too."""
_BESIDE = Role.SHARDS_PARAMETERS


@dataclass(frozen=True, slots=True)
class _Part:
    """Seconds of a micro-batch: of the device in order, and of the host."""

    device_s: float = 0.0
    host_s: float = 0.0

    @property
    def least_s(self) -> float:
        return max(self.device_s, self.host_s)

    def __add__(self, other: "_Part") -> "_Part":
        return _Part(self.device_s + other.device_s, self.host_s + other.host_s)

    def and_half(self, other: "_Part") -> "_Part":
        return _Part(self.device_s + other.device_s / 2, self.host_s + other.host_s / 2)

    def of(self, share: float, more_s: float = 0.0) -> "_Part":
        """Of a share of the tokens, and what the device does beside: launches are as many."""
        return _Part(self.device_s * share + more_s, self.host_s)


class Bounds:
    """Of a piece's Program on a machine. setup: what all candidates share. gathers: whether context ranks
    that it was traced without would gather keys and values, and so wait for them."""

    def __init__(self, program: Program, machine: Machine, setup: Setup, *, gathers: bool = True) -> None:
        self.program, self.machine, self.setup, self.gathers = program, machine, setup, gathers
        self.layers = max(1, layers_of(program)[1])
        work = work_of(program, machine, replace(setup, mesh=Mesh(program.axes))).without(setup.without)
        beside = [role_of(name) is _BESIDE for name in ("", *work.axes)]
        in_order = ~np.array(beside)[work.axis]
        device_s = np.where(in_order, work.device_s, 0.0)
        together_s = device_s + (work.host_s if work.together else 0.0)

        def part(rows: NDArray[np.bool_]) -> _Part:
            host_s = 0.0 if work.together else float(work.host_s[rows].sum())
            return _Part(float(together_s[rows].sum()), host_s)

        passes = work.in_phases(*FORWARDS, *BACKWARDS)
        inside = passes & (work.layer >= 0)
        self.all_layers = part(inside)
        self.ends = part(passes & ((work.layer == BEFORE) | (work.layer == AFTER)))
        own = [TERMS.index(term) for term in (Term.MATMUL, Term.ATTENTION, Term.KERNELS)]
        forward = work.in_phases(Phase.FORWARD) & (work.layer >= 0) & np.isin(work.term, own)
        kernels = forward & (work.term == TERMS.index(Term.KERNELS))
        matmuls = forward & (work.term == TERMS.index(Term.MATMUL))
        self._forward = {"full": part(forward), "selective-ops": part(kernels).and_half(part(matmuls))}
        once = work.in_phases(*ONCE) & (work.axis == 0)
        self.end_s = float(together_s[once].sum())

    def step_s(
        self,
        mesh: Mesh,
        micro_batches: int,
        chunks: int,
        *,
        recompute: str = "none",
        recomputed: int = 0,
        beside_s: float = 0.0,
    ) -> float:
        """At least, of the whole step over `mesh`, with so many of the layers recomputed. beside_s: FSDP's
        collectives of a micro-batch, where another piece tells them (beside_s())."""
        stages, share = mesh.stages, Mesh(self.program.axes).context / mesh.context
        layers = self.all_layers.of(share, self._gathered_s(mesh))
        per_layer_s = layers.least_s / self.layers
        whole = layers + self.ends.of(share) + self._again(recompute, recomputed, share)
        mean_s = max(whole.least_s, self.beside_s(mesh), beside_s) / stages
        busiest_s = max(mean_s, per_layer_s * -(-self.layers // stages))
        way_s = (stages - 1) * per_layer_s * (self.layers // (stages * chunks))
        return micro_batches * busiest_s + way_s + self._end_s(mesh)

    def _again(self, recompute: str, layers: int, share: float) -> _Part:
        """What recomputing so many of the layers adds at least: their own work once more, without exchanges.
        share: of a sequence's tokens."""
        if not layers:
            return _Part()
        again, surely = self._forward[recompute], SURELY * layers / self.layers
        return _Part(again.device_s * share * surely, again.host_s * surely)

    def device_bytes(self, mesh: Mesh, micro_batches: int, *, recomputes: bool) -> float:
        """At least, of the fullest stage's device. recomputes: with any recompute there is."""
        stages, shards = mesh.stages, self.shards(mesh)
        kept = self._kept_bytes[recomputes] * Mesh(self.program.axes).context / mesh.context
        held = self._states[0] / shards + self._states[1] / (shards * self.setup.optimizer_shards)
        in_flight = min(stages, micro_batches)
        layers = self.layers // stages if stages > 1 else self.layers
        active = held / stages + in_flight * layers * kept
        return active + self.machine.context_bytes

    @property
    def freed_bytes(self) -> float:
        """By which a device holds less, at most, for each layer that is recomputed. 0: it isn't known, of a
        Program that isn't compressed, or compiled."""
        kept, between = self._kept_bytes
        return (kept - between) * MOST_FREED

    def shards(self, mesh: Mesh) -> float:
        """Into how many parts the states of this Program's rank are cut on the mesh."""
        traced = Mesh(self.program.axes)
        return max(1.0, prod(map(mesh.size, mesh.shard_axes)) / prod(map(traced.size, traced.shard_axes)))

    def _gathered_s(self, mesh: Mesh) -> float:
        """An all-gather of keys and values and a reduce-scatter of their gradients, for each attention,
        over context ranks that it was traced without."""
        if mesh.context == Mesh(self.program.axes).context or not self.gathers:
            return 0.0
        stride = mesh.world_size // (mesh.stages * mesh.size(REPLICAS_AXIS) * mesh.fsdp * mesh.context)
        ranks, total = RankGroup(((stride, mesh.context),)), 0.0
        for kind in (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER):
            for n_bytes, times in self._keys_bytes:
                sent = wire_bytes(kind, n_bytes, ranks.size)
                total += times * collective_s(self.machine, kind, sent, n_bytes, ranks)
        return total

    @cached_property
    def _keys_bytes(self) -> list[tuple[int, int]]:
        """(bytes of all of a sequence's keys and values, how often) of the forward's attention ops."""
        found = []
        for block in self.program.blocks:
            for item in block.items:
                if isinstance(item, Op) and item.kind is OpKind.ATTENTION and item.phase is Phase.FORWARD:
                    n_bytes = sum(
                        prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 2) for spec in item.inputs[1:3]
                    )
                    found.append((n_bytes, block.times))
        return found

    @cached_property
    def _states(self) -> tuple[float, float]:
        """Bytes of (parameters and gradients, the optimizer's state) of a rank."""
        parameter, gradient, optimizer = (
            float(self.program.held(kind))
            for kind in (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
        )
        if self.setup.precision is Precision.MASTER:
            parameter, gradient, optimizer = (parameter * share for share in OF_MASTER)
        return parameter + gradient, optimizer

    @cached_property
    def _kept_bytes(self) -> tuple[float, float]:
        """Bytes of activations that a layer leaves for its backward: as it was traced, and with any
        recompute (what lies between two layers)."""
        between = float(boundary_bytes(self.program))
        kept = 0.0
        for block in self.program.blocks:
            if block.times > 1 and not self.setup.compiled:  # a compiler makes some of it again
                kept = max(kept, sum(map(_forward_activation, block.items)) / abs(block.stride))
        return max(kept, between), between

    def beside_s(self, mesh: Mesh) -> float:
        """FSDP's collectives of a micro-batch over all layers, where the piece has them: the same however
        many tokens there are."""
        return self._collectives_s("beside", self._beside_items, mesh)

    def _end_s(self, mesh: Mesh) -> float:
        reduced_s = 0.0 if self.setup.overlap_data else self._collectives_s("end", self._reduced_items, mesh)
        own_s = self.end_s / (self.shards(mesh) * self.setup.optimizer_shards)
        return own_s / mesh.stages + reduced_s

    def _collectives_s(self, what: str, items: dict[str, list[tuple[Collective, int]]], mesh: Mesh) -> float:
        """what: they are, for what is known already."""
        setup = replace(self.setup, mesh=mesh)
        total = 0.0
        for axis, own in items.items():
            group = group_of(axis, self.program, setup)
            key = (what, axis, group, mesh)
            if key not in self._known_s:
                self._known_s[key] = sum(
                    times
                    * collective_cost(
                        item, self.machine, setup, group, end_share(item, self.program, setup)
                    ).device_s
                    for item, times in own
                )
            total += self._known_s[key]
        return total

    @cached_property
    def _known_s(self) -> dict[tuple[str, str, RankGroup, Mesh], float]:
        return {}

    @cached_property
    def _beside_items(self) -> dict[str, list[tuple[Collective, int]]]:
        return self._items(lambda item: role_of(item.call.axis) is _BESIDE and item.phase in IN_LAYERS)

    @cached_property
    def _reduced_items(self) -> dict[str, list[tuple[Collective, int]]]:
        return self._items(lambda item: item.phase in ONCE)

    def _items(self, chosen: Callable[[Collective], bool]) -> dict[str, list[tuple[Collective, int]]]:
        found: dict[str, list[tuple[Collective, int]]] = {}
        for block in self.program.blocks:
            for item in block.items:
                if isinstance(item, Collective) and chosen(item):
                    found.setdefault(item.call.axis, []).append((item, block.times))
        return found


def _forward_activation(item: Item) -> int:
    """What it adds to the activations that are kept."""
    match item:
        case MemoryChange(kind=MemoryKind.ACTIVATION, phase=Phase.FORWARD):
            return max(0, item.n_bytes)
        case _:
            return 0
