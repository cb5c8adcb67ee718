"""Bounds: what a step takes at least. From one traced piece, for any mesh that it can be rescaled to, in
microseconds: so that most candidates need no prediction.

It is the busiest stage's micro-batches, in each the longer of the device's work in order, the host's issuing,
and FSDP's collectives beside it; the way of the first micro-batch to that stage and back; the step's end.

Each is what predict counts, less what it adds: waiting that doesn't add up layer by layer, what
collectives beside the work slow down. A piece bounds those that only add work to it:
of a root also every recompute and data axis (Piece.root)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.machine import Machine
from shardwise.core.mesh import REPLICAS_AXIS, Mesh, Role, role_of
from shardwise.core.op_names import ALTERNATE_MATMULS, FSDP_COPY_OUT, FSDP_REDUCE_IN, KEPT_OPS
from shardwise.core.pipeline import recomputed_spans
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import (
    BACKWARDS,
    FORWARDS,
    IN_LAYERS,
    ONCE,
    Collective,
    Op,
    OpKind,
    Phase,
    Program,
)
from shardwise.core.search import Candidate
from shardwise.predict.costs import collective_cost, collective_s
from shardwise.predict.groups import RankGroup, end_share, group_of
from shardwise.predict.work import AFTER, BEFORE, TERMS, Work, work_of
from shardwise.search.needs import Needs, pipeline_of

_BESIDE = Role.SHARDS_PARAMETERS


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of a micro-batch: of the device in order, and of the host."""

    device_s: float = 0.0
    host_s: float = 0.0

    @property
    def least_s(self) -> float:
        return max(self.device_s, self.host_s)

    def __add__(self, other: "Part") -> "Part":
        return Part(self.device_s + other.device_s, self.host_s + other.host_s)

    def __sub__(self, other: "Part") -> "Part":
        """Never less than nothing."""
        return Part(max(0.0, self.device_s - other.device_s), max(0.0, self.host_s - other.host_s))

    def __mul__(self, factor: float) -> "Part":
        return Part(self.device_s * factor, self.host_s * factor)

    def of(self, share: float, more_s: float = 0.0) -> "Part":
        """Of a share of the tokens, and what the device does beside: launches are as many."""
        return Part(self.device_s * share + more_s, self.host_s)


def _runs_again(work: Work) -> NDArray[np.bool_]:
    """What a full recompute surely runs again: a layer's own work up to its last matmul. It ends with what
    the backward needs, and that may be what this one takes."""
    own = [TERMS.index(term) for term in (Term.MATMUL, Term.ATTENTION, Term.KERNELS)]
    forward = work.in_phases(Phase.FORWARD) & (work.layer >= 0) & np.isin(work.term, own)
    rows = np.flatnonzero(forward & (work.term == TERMS.index(Term.MATMUL)))
    last = np.zeros(int(work.layer.max(initial=0)) + 1, np.int64)
    np.maximum.at(last, work.layer[rows], rows)
    return forward & (np.arange(len(work)) < last[np.maximum(work.layer, 0)])


def _copies_all(work: Work, program: Program) -> NDArray[np.bool_]:
    """FSDP's copies of what isn't cut, which are as long over any number of ranks."""
    names = {FSDP_COPY_OUT} if program.settings.reduce_once else {FSDP_COPY_OUT, FSDP_REDUCE_IN}
    return np.array([isinstance(item, Op) and item.name in names for item in work.items], np.bool_)[
        work.template
    ]


def _is_kept(work: Work, again: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What a selective recompute keeps of that, and doesn't run again."""
    names = [item.name if isinstance(item, Op) else "" for item in work.items]
    kept = np.array([name in KEPT_OPS for name in names], np.bool_)[work.template]
    alternate = np.array([name in ALTERNATE_MATMULS for name in names], np.bool_)[work.template] & again
    seen: Counter[int] = Counter()
    for row in np.flatnonzero(alternate):
        layer = int(work.layer[row])
        kept[row] = seen[layer] % 2 == 0
        seen[layer] += 1
    return kept


NO_WORK = Part()


@dataclass(frozen=True, slots=True)
class Sharding:
    """What FSDP adds to a micro-batch over all layers, however many tokens there are. beside_s: seconds of
    its collectives, beside the work. copies_s: of the device's copies between them and the parameters."""

    beside_s: float = 0.0
    copies_s: float = 0.0


NO_SHARDING = Sharding()


@dataclass(frozen=True, slots=True)
class Less:
    """What of a micro-batch falls away at most: of all layers, of what lies before and after them, and of
    all layers' forward where it runs again."""

    layers: Part = NO_WORK
    ends: Part = NO_WORK
    again: Part = NO_WORK


NOTHING_LESS = Less()


@dataclass(frozen=True, slots=True)
class _Dealt:
    """(layers, of these run again): of the model, of the stages that are unlike, each with the last one that
    is so, and of a part at least."""

    all: tuple[int, int]
    stages: tuple[tuple[tuple[int, int], int], ...]
    least_part: tuple[int, int]


@lru_cache(65536)
def _dealt(stages: int, chunks: int, layers: int, recomputed: int) -> _Dealt:
    pipeline = pipeline_of(stages, chunks)
    spans = pipeline.spans(layers)
    again = recomputed_spans(spans, recomputed) if recomputed else ()
    counts = [span.count for span in spans]
    run_again = [span.count for span in again] or [0] * len(counts)
    by_stage = {
        (sum(counts[part] for part in parts), sum(run_again[part] for part in parts)): stage
        for stage, parts in enumerate(map(pipeline.parts_of, range(stages)))
    }
    least_part = min(counts), min(run_again)
    return _Dealt((layers, sum(run_again)), tuple(by_stage.items()), least_part)


class Bounds:
    """Of a piece's Program on a machine. setup: what all candidates share. gathers: whether context ranks
    that it was traced without would gather keys and values, and so wait for them."""

    def __init__(self, program: Program, machine: Machine, setup: Setup, *, gathers: bool = True) -> None:
        self.program, self.machine, self.setup, self.gathers = program, machine, setup, gathers
        self.needs, self.traced = Needs(program, machine, setup), Mesh(program.axes)
        self.layers = self.needs.layers
        work = work_of(program, machine, replace(setup, mesh=Mesh(program.axes))).without(setup.without)
        beside = [role_of(name) is _BESIDE for name in ("", *work.axes)]
        in_order = ~np.array(beside)[work.axis]
        device_s = np.where(in_order, work.device_s, 0.0)
        together_s = device_s + (work.host_s if work.together else 0.0)

        def part(rows: NDArray[np.bool_]) -> Part:
            host_s = 0.0 if work.together else float(work.host_s[rows].sum())
            return Part(float(together_s[rows].sum()), host_s)

        passes = work.in_phases(*FORWARDS, *BACKWARDS)
        inside = passes & (work.layer >= 0)
        self.all_layers = part(inside)
        self.before, self.after = (part(passes & (work.layer == side)) for side in (BEFORE, AFTER))
        again = _runs_again(work)
        self._forward = {"none": NO_WORK, "full": part(again)}
        self._forward["selective-ops"] = part(again & ~_is_kept(work, again))
        self.copies_s = part(inside & _copies_all(work, program)).device_s
        once = work.in_phases(*ONCE) & (work.axis == 0)
        self.end_s = float(together_s[once].sum())

    def step_s(
        self, candidate: Candidate, *, sharding: Sharding = NO_SHARDING, less: Less = NOTHING_LESS
    ) -> float:
        """At least, of the whole step, whose styles are as they were traced but for what falls away (less),
        with as many layers recomputed as the candidate says. sharding: as another piece tells it, of one that
        was traced without."""
        mesh = candidate.mesh
        stages, share = mesh.stages, self.traced.context / mesh.context
        if self.traced.shard_axes:  # its copies are among its work
            sharding = replace(self.sharding(mesh), copies_s=0.0)
        again = (self._forward[candidate.recompute].of(share) - less.again) * (1 / self.layers)
        layers = self.all_layers.of(share, self._gathered_s(mesh) + sharding.copies_s) - less.layers
        own = layers * (1 / self.layers)
        dealt = _dealt(stages, candidate.chunks, self.layers, candidate.recomputed)
        before, after = self.before.of(share), self.after.of(share)

        def least_s(counts: tuple[int, int], ends: Part = NO_WORK) -> float:
            work = own * counts[0] + again * counts[1] + ends
            return max(work.least_s, sharding.beside_s * counts[0] / self.layers)

        part_s, count = least_s(dealt.least_part), candidate.micro_batches
        passes_s = count * least_s(dealt.all, before + after - less.ends) / stages
        for counts, stage in dealt.stages:
            ends = after - less.ends if stage == stages - 1 else NO_WORK
            passes_s = max(passes_s, count * least_s(counts, ends) + stage * part_s)
        return passes_s + self._end_s(mesh)

    def _gathered_s(self, mesh: Mesh) -> float:
        """An all-gather of keys and values and a reduce-scatter of their gradients, for each attention,
        over context ranks that it was traced without."""
        if mesh.context == self.traced.context or not self.gathers:
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

    def sharding(self, mesh: Mesh) -> Sharding:
        """Of a piece that has FSDP's ranks."""
        return Sharding(self._collectives_s("beside", self._beside_items, mesh), self.copies_s)

    def _end_s(self, mesh: Mesh) -> float:
        reduced_s = 0.0 if self.setup.overlap_data else self._collectives_s("end", self._reduced_items, mesh)
        own_s = self.end_s / (self.needs.shards(mesh) * self.setup.optimizer_shards)
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
