"""Needs: what a device holds at least. From one traced piece, for any mesh that it can be rescaled to: a mean
stage's states, and the activations of as many micro-batches as its schedule holds at least. So also how many
layers must be recomputed at least.

Each is what predict counts, less what an allocator adds and, over stages, what comes and goes. A piece bounds
those that only add to it: of a root also every recompute and data axis (Piece.root)."""

import math
from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from math import prod

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import layer_index
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh, Role
from shardwise.core.op_names import ALTERNATE_MATMULS, KEPT_OPS
from shardwise.core.pipeline import Pipeline, fewest_recomputed, most_in_flight
from shardwise.core.prediction import Precision, Setup
from shardwise.core.program import Block, MemoryChange, MemoryKind, Op, Phase, Program
from shardwise.core.search import Candidate
from shardwise.predict.allocator import LARGE_SEGMENT
from shardwise.predict.memory import OF_MASTER, peak_by_kind
from shardwise.predict.scores import with_scores
from shardwise.predict.stage_memory import STATES
from shardwise.predict.work import boundary_bytes, layers_of

CHOSEN_OPS = frozenset((*KEPT_OPS, *ALTERNATE_MATMULS))


class Needs:
    """Of a piece's Program on a machine. setup: what all candidates share."""

    def __init__(self, program: Program, machine: Machine, setup: Setup) -> None:
        program = with_scores(program, setup)
        self.layers = max(1, layers_of(program)[1])
        self._setup, self._context_bytes = setup, machine.context_bytes
        self._traced = Mesh(program.axes)
        self._shards: dict[Mesh, float] = {}
        self._between = float(boundary_bytes(program))
        nothing = [0.0] * self.layers  # is known of what a compiler makes again
        plain, chosen = (nothing, nothing) if setup.compiled else _kept_by_layer(program, self.layers)
        plain = [max(each, self._between) for each in plain]
        selective = [min(a, b + self._between) for a, b in zip(plain, chosen, strict=True)]
        self._kept = {"none": plain, "selective-ops": selective, "full": [self._between] * self.layers}
        parameter, gradient, optimizer = (
            float(program.held(kind))
            for kind in (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
        )
        if setup.precision is Precision.MASTER:
            parameter, gradient, optimizer = (parameter * share for share in OF_MASTER)
        self._parameter, self._gradient, self._optimizer = parameter, gradient, optimizer
        self._passing = 0.0 if setup.compiled else max(0.0, _most_in_passes(program, setup) - sum(plain))
        self._gathered_bytes = _gathered_bytes(program)

    def in_other_styles(self, whole: "Needs | None") -> "Needs":
        """What a rank holds at least whatever the styles of its groups: together, the ranks of tp keep all
        that one rank keeps of the whole model. whole: of that, where it is known."""
        tp, found = self._traced.tp, copy(self)
        found._kept = {
            kind: [max(self._between, each / tp) for each in kept]
            for kind, kept in (whole or self)._kept.items()
        }
        found._passing = 0.0
        return found

    def shards(self, mesh: Mesh) -> float:
        """Into how many parts the states of this Program's rank are cut on the mesh."""
        if mesh not in self._shards:
            parts = (prod(map(each.size, each.shard_axes)) for each in (mesh, self._traced))
            self._shards[mesh] = max(1.0, next(parts) / next(parts))
        return self._shards[mesh]

    def device_bytes(self, candidate: Candidate, recompute: str = "none") -> float:
        """At least, of the first stage's device, with all layers under that recompute. What comes and goes
        at the peak is known of a whole step alone."""
        mesh, tokens = candidate.mesh, self._tokens(candidate.mesh)
        layers, in_flight, received = _of_first_stage(
            mesh.stages, candidate.chunks, self.layers, candidate.micro_batches
        )
        shards = self.shards(mesh)
        held = self._parameter / shards + self._optimizer / (shards * self._setup.optimizer_shards)
        if candidate.micro_batches > mesh.stages or self._setup.precision is Precision.MASTER:
            held += self._gradient / shards  # it is there while others are in flight
        if not candidate.reshard and mesh.fsdp > 1:
            held += self._gathered_bytes
        kept = in_flight * self._kept_bytes(recompute, layers) + received * self._between
        kept += self._passing if mesh.stages == 1 else 0.0
        return held * layers / self.layers + kept * tokens + self._context_bytes

    def _kept_bytes(self, recompute: str, layers: int) -> float:
        """Activations of a micro-batch that so many of the layers leave for their backward."""
        return sum(sorted(self._kept[recompute])[:layers])

    def freed_bytes(self, recompute: str) -> float:
        """Activations of a micro-batch that a layer leaves fewer, at most, under that recompute. 0: it isn't
        known, of what is compiled."""
        pairs = zip(self._kept["none"], self._kept[recompute], strict=True)
        return max(plain - left for plain, left in pairs)

    def fewest_layers(self, candidate: Candidate, recompute: str, limit: float) -> int | None:
        """So many of the model's layers must be recomputed at least for a device to hold `limit` bytes; None
        where all of them are too few."""
        if self.device_bytes(candidate, recompute) > limit:
            return None
        mesh = candidate.mesh
        _, in_flight, _ = _of_first_stage(mesh.stages, candidate.chunks, self.layers, candidate.micro_batches)
        over_bytes = self.device_bytes(candidate) - limit - LARGE_SEGMENT
        freed_bytes = in_flight * self.freed_bytes(recompute) * self._tokens(mesh)
        if over_bytes <= 0 or freed_bytes <= 0:
            return 1
        of_stage = math.ceil(over_bytes / freed_bytes - 1e-9)
        return fewest_recomputed(pipeline_of(mesh.stages, candidate.chunks), self.layers, of_stage, 0)

    def _tokens(self, mesh: Mesh) -> float:
        """Of those that were traced."""
        return self._traced.context / mesh.context


@lru_cache(4096)
def pipeline_of(stages: int, chunks: int) -> Pipeline:
    """As a candidate's layers are dealt."""
    return Setup(Mesh.of({Role.CUTS_DEPTH: stages}), chunks=chunks).pipeline()


@lru_cache(65536)
def _of_first_stage(stages: int, chunks: int, layers: int, micro_batches: int) -> tuple[int, float, int]:
    """(layers that it has, micro-batches of which it holds activations at once, buffers for what comes from
    the next one)."""
    if stages == 1:
        return layers, 1.0, 0
    pipeline = pipeline_of(stages, chunks)
    spans, parts = pipeline.spans(layers), pipeline.parts_of(0)
    played = micro_batches if micro_batches % stages else min(micro_batches, 4 * stages)  # more hold no more
    most = most_in_flight(pipeline.turns(0, played))
    return sum(spans[part].count for part in parts), most / chunks, (2 * chunks - 1) * micro_batches


def _kept_by_layer(program: Program, layers: int) -> tuple[list[float], list[float]]:
    """Bytes of activations that each layer leaves for its backward: (as it was traced, of these what
    selective-ops recompute keeps of its ops)."""
    prefix, _ = layers_of(program)
    plain, selective = [0.0] * layers, [0.0] * layers
    matmuls = [0] * layers
    for block in program.blocks:
        rows = list(_rows(block, prefix))
        for shift in range(0, block.times * block.stride, block.stride):
            for at, n_bytes, op in rows:
                layer = at + shift
                if op is None:
                    plain[layer] += n_bytes
                elif op in KEPT_OPS:
                    selective[layer] += n_bytes
                else:
                    selective[layer] += n_bytes * (matmuls[layer] % 2 == 0)
                    matmuls[layer] += 1
    return plain, selective


def _most_in_passes(program: Program, setup: Setup) -> float:
    """Bytes of activations and of what comes and goes in a forward and backward, at the most."""
    by_kind = peak_by_kind(program, setup, dict.fromkeys(STATES, 0.0))
    return sum(by_kind.get(kind, 0.0) for kind in (MemoryKind.ACTIVATION, MemoryKind.TEMPORARY))


def _gathered_bytes(program: Program) -> float:
    """Of the layers' parameters of a rank, where FSDP doesn't cut them."""
    prefix, _ = layers_of(program)
    mesh, settings = Mesh(program.axes), program.settings
    widths = [DTYPE_BYTES.get(name, 2) for name in (settings.computed_dtype, settings.dtype)]
    own = sum(each.parameter_bytes for each in program.holdings if layer_index(each.name, prefix) is not None)
    return own * prod(map(mesh.size, mesh.shard_axes)) * min(1.0, widths[0] / widths[1])


def _rows(block: Block, prefix: str | None) -> Iterator[tuple[int, int, str | None]]:
    """(layer, bytes, op) of what comes in a forward: an activation, or what an op gives that is kept."""
    for item in block.items:
        layer = layer_index(item.module, prefix)
        match item:
            case MemoryChange(kind=MemoryKind.ACTIVATION, phase=Phase.FORWARD) if layer is not None:
                yield layer, max(0, item.n_bytes), None
            case Op(phase=Phase.FORWARD) if layer is not None and item.name in CHOSEN_OPS:
                yield layer, made_bytes(item), item.name


def made_bytes(op: Op) -> int:
    """Of its outputs."""
    return sum(prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 2) for spec in op.outputs)
