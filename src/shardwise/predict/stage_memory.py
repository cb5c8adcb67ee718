"""Which of a Program's parameters and memory changes each stage of a pipeline has: those of its layers, on
the first stage also what comes before them, on the last what comes after.

A Program tells where a storage was made: the module, and so its layer. What lies outside the layers is before
or after them as its module's first op in the forward is. A tied parameter is on both ends. What FSDP gathers
for the whole model at once, of parameters outside the layers, each end gathers for its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import Mesh
from shardwise.core.op_names import FSDP_REDUCE_IN
from shardwise.core.pipeline import Span, most_in_flight
from shardwise.core.prediction import Setup
from shardwise.core.program import (
    LOSS_MODULE,
    ONCE,
    Block,
    Holding,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    Phase,
    Program,
)
from shardwise.predict.work import AFTER, BEFORE, boundary_bytes, layers_of

STATES = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)


@dataclass(frozen=True, slots=True)
class StagePart:
    """What one stage has. in_flight: micro-batches of which it holds activations at once, over the parts that
    it has; then_in_flight: once the first backward has left its gradients. shares: of the states that a rank
    holds, by kind. gathers_for_all: what of the parameters outside the layers is its own, where FSDP gathers
    them at once; None where nothing is gathered. tied_bytes: gradients of its own of parameters that the
    other end finds first. received_bytes: buffers for what comes from other stages, which PyTorch's pipelines
    keep for every micro-batch (torch.distributed.pipelining's stage). keeps_parameters: FSDP gathers them but
    once, for all micro-batches (step/pipeline.py)."""

    stage: int
    spans: tuple[Span, ...]
    ends: frozenset[int]
    sides: Mapping[str, int]
    prefix: str | None
    in_flight: float
    then_in_flight: float
    shares: Mapping[MemoryKind, float] = field(default_factory=dict)
    gathers_for_all: float | None = None
    tied_bytes: int = 0
    received_bytes: int = 0
    keeps_parameters: bool = False

    def share_of(self, change: MemoryChange) -> float:
        """How much of what comes or goes there does so on this stage."""
        if change.phase in ONCE:
            return self.shares[MemoryKind.PARAMETER]
        if self._is_of_all(change):
            return self.gathers_for_all or 0.0
        return float(self.has(change.module))

    def is_gathered(self, change: MemoryChange) -> bool:
        """Whether it is a buffer of parameters that FSDP gathers, not an activation: one for all that are in
        flight."""
        return change.is_gathered or self._is_of_all(change)

    def stays(self, change: MemoryChange) -> bool:
        """Whether what goes in the backward of a micro-batch that isn't the last does not: parameters that
        FSDP kept after the forward, which other micro-batches still need."""
        is_kept = self.keeps_parameters and change.phase is Phase.FORWARD
        return is_kept and change.n_bytes < 0 and self.is_gathered(change)

    def is_there(self, change: MemoryChange) -> bool:
        """Whether a micro-batch that isn't the first doesn't make it: what FSDP gathers parameters into,
        beside the computation, where it has kept them."""
        return self.keeps_parameters and change.phase is Phase.FORWARD and change.stream > 0

    def waits(self, activation: MemoryChange) -> bool:
        """Whether every micro-batch that is in flight holds one of its own, until its backward: of its
        forward, and not what running that again makes."""
        return activation.phase is not Phase.RECOMPUTE and not self.is_gathered(activation)

    def _is_of_all(self, change: MemoryChange) -> bool:
        """Whether FSDP gathers it for the whole model."""
        return self.gathers_for_all is not None and not change.module

    def has(self, module: str) -> bool:
        """Whether what this module makes is made on this stage."""
        index = layer_index(module, self.prefix)
        if index is None:
            return _side(module, self.sides) in self.ends
        return any(index in span for span in self.spans)

    def holds(self, holding: Holding) -> bool:
        """Whether it has this parameter, or a tied one's other place."""
        return any(self.has(name.rpartition(".")[0]) for name in (holding.name, *holding.shared))

    def of_chunk(self, chunk: int, part: int, parts: int) -> "StagePart":
        """With the layers of one of its chunks alone, which is this part of so many of the model's."""
        ends = [end for end, at in ((BEFORE, 0), (AFTER, parts - 1)) if at == part]
        return replace(self, spans=(self.spans[chunk],), ends=frozenset(ends))

    def in_order(self, block: Block) -> Sequence[int]:
        """Indexes of a block's items in the order in which they come here. FSDP2's foreach_reduce still holds
        the gradient of a unit's last parameter when what it was reduced to comes: of what it reduces for the
        whole model, the last is another where a stage hasn't all of it."""
        items = block.items
        order = list(range(len(items)))
        if self.gathers_for_all is None:
            return order
        for start, item in enumerate(items):
            is_reduced = isinstance(item, Op) and item.name == FSDP_REDUCE_IN
            if not is_reduced or layer_index(item.module, self.prefix) is not None:
                continue
            came = next(at for at, each in enumerate(items[start:], start) if _is_gradient(each))
            freed = [at for at in range(start, came) if self._frees_here(items[at])]
            held = [at for at in range(came, len(items)) if self._frees_here(items[at])]
            if freed and not held:
                order.remove(freed[-1])
                order.insert(order.index(came) + 1, freed[-1])
        return order

    def _frees_here(self, item: Item) -> bool:
        """Whether it is the end of a storage that the backward of one of its modules made."""
        is_end = isinstance(item, MemoryChange) and item.n_bytes < 0 and item.phase is Phase.BACKWARD
        return is_end and item.module != "" and self.has(item.module)

    def stretches(self, block: Block) -> Iterator[tuple[NDArray[np.float64], int]]:
        """Of a block's stretches, those in a row of which it has the same: how much of each item, and how
        many. What a stretch does for the next layer, such as gathering its parameters, is that layer's."""
        layers = np.array([_index(item.module, self.prefix) for item in block.items])
        outside = layers < 0
        shares = np.array(
            [
                self.share_of(item) if isinstance(item, MemoryChange) and is_out else 0.0
                for item, is_out in zip(block.items, outside, strict=True)
            ]
        )
        before, times = None, 0
        for repeat in range(block.times):
            at = layers + repeat * block.stride
            inside = ~outside & np.any([(at >= span.first) & (at < span.stop) for span in self.spans], axis=0)
            own = np.where(outside, shares if block.times == 1 else float(inside.any()), inside)
            if before is not None and np.array_equal(own, before):
                times += 1
                continue
            if before is not None:
                yield before, times
            before, times = own, 1
        if before is not None:
            yield before, times


def stage_parts(program: Program, setup: Setup) -> tuple[StagePart, ...]:
    """Of the stages that are unlike: of those with as many layers the first, which has most in flight, and
    both ends. Empty where there is one stage."""
    if setup.stages == 1:
        return ()
    prefix, n_layers = layers_of(program)
    pipeline = setup.pipeline()
    spans, sides = pipeline.spans(n_layers, program.model), _sides(program, prefix)
    found: dict[object, StagePart] = {}
    for stage in range(setup.stages):
        own = tuple(spans[part] for part in pipeline.parts_of(stage))
        ends = frozenset(
            end for end, at in ((BEFORE, 0), (AFTER, pipeline.parts - 1)) if at in pipeline.parts_of(stage)
        )
        key = tuple(span.count for span in own), ends
        if key in found and program.compressed:
            continue
        turns = pipeline.turns(stage, setup.micro_batches)
        first = next(at for at, turn in enumerate(turns) if turn.backward)
        in_flight = most_in_flight(turns) / pipeline.chunks
        then = (first - 1 + most_in_flight(turns[first + 1 :])) / pipeline.chunks
        part = StagePart(stage, own, ends, sides, prefix, in_flight, then)
        comes = 2 * pipeline.chunks - len(ends)
        keeps = setup.micro_batches > 1 and not program.settings.reshard_after_forward
        received_bytes = comes * setup.micro_batches * boundary_bytes(program)
        part = replace(part, received_bytes=received_bytes, keeps_parameters=keeps)
        found[key if program.compressed else stage] = _with_states(part, program)
    return tuple(found.values())


def _with_states(part: StagePart, program: Program) -> StagePart:
    held: dict[MemoryKind, float] = dict.fromkeys(STATES, 0.0)
    whole: dict[MemoryKind, float] = dict.fromkeys(STATES, 0.0)
    outer = outer_here = tied_bytes = 0
    for holding in program.holdings:
        here = [part.has(name.rpartition(".")[0]) for name in (holding.name, *holding.shared)]
        for kind, n_bytes in zip(STATES, _state_bytes(holding), strict=True):
            whole[kind] += n_bytes
            held[kind] += n_bytes * any(here)
        if any(here) and not here[-1]:  # its last use finds the gradient, which the walk sees there
            tied_bytes += holding.gradient_bytes
        if layer_index(holding.name, part.prefix) is None:
            outer += holding.parameter_bytes
            outer_here += holding.parameter_bytes * any(here)
    shares = {kind: held[kind] / whole[kind] if whole[kind] else 0.0 for kind in STATES}
    gathers = outer_here / outer if outer and Mesh(program.axes).fsdp > 1 else None
    return replace(part, shares=shares, gathers_for_all=gathers, tied_bytes=tied_bytes)


def _state_bytes(holding: Holding) -> tuple[int, int, int]:
    return holding.parameter_bytes, holding.gradient_bytes, holding.optimizer_bytes


def _sides(program: Program, prefix: str | None) -> dict[str, int]:
    """Of each module outside the layers that runs an op in the forward: before them, or after."""
    sides: dict[str, int] = {}
    side = BEFORE
    for op in _forward(program.blocks):
        if layer_index(op.module, prefix) is not None:
            side = AFTER
        else:
            sides.setdefault(op.module, side)
    return sides


def _forward(blocks: Sequence[Block]) -> Iterator[Op]:
    for block in blocks:
        for item in block.items:
            if isinstance(item, Op) and item.phase is Phase.FORWARD:
                yield item


def _is_gradient(item: Item) -> bool:
    return isinstance(item, MemoryChange) and item.kind is MemoryKind.GRADIENT and item.n_bytes > 0


def _index(module: str, prefix: str | None) -> int:
    index = layer_index(module, prefix)
    return -1 if index is None else index


def _side(module: str, sides: Mapping[str, int]) -> int:
    """Of a module that runs no op, such as one that only holds others, that of what is inside it."""
    if module in sides:
        return sides[module]
    if module == LOSS_MODULE:
        return AFTER
    inside = [side for name, side in sides.items() if name.startswith(f"{module}.")]
    return inside[0] if inside else BEFORE
