"""Scores: what unfused attention holds of its score matrices, of B N S S entries each, which a fused kernel
never writes: as changes of memory beside its ops. In half precision, bytes an entry:

    kept      softmax's output 2, dropout's mask 1 and output 2: of the s b h (34 + 5 a s / h) bytes of
              activations a layer the second term
    passing   forward: the scores that softmax reads, 2; backward: the gradients of dropout's output and of
              softmax's, 2 each (softmax's own is written over it)
    again     selective recompute keeps none: its backward makes those of one layer again

Source: Korthikanti et al. 2022, section 4.1; Megatron's fused softmax, whose backward writes in place.
Dropout is always counted, as in costs.py. What it doesn't know: the five ops of a softmax that isn't fused,
which pass through float32."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.layer_name import layer_index
from shardwise.core.prediction import AttentionKernel, Setup
from shardwise.core.program import Item, MemoryChange, MemoryKind, Op, OpKind, Phase, Program
from shardwise.predict.groups import joining_context
from shardwise.predict.work import layers_of

SCORES, SOFTMAX, MASK, DROPPED = "scores", "scores' softmax", "scores' dropout mask", "scores' dropout"
"""Makers of storages."""


def with_scores(program: Program, setup: Setup) -> Program:
    """The program with what its attention holds in the setup."""
    if setup.attention is not AttentionKernel.UNFUSED:
        return program
    writer = _Writer(program, setup)
    blocks = (replace(block, items=tuple(writer.items(block.items))) for block in program.blocks)
    return replace(program, blocks=tuple(blocks))


def query_and_keys(op: Op) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of an attention op's queries and keys."""
    first = 1 if "backward" in op.name else 0
    return op.inputs[first].shape, op.inputs[first + 1].shape


class _Writer:
    def __init__(self, program: Program, setup: Setup) -> None:
        self._context, self._again = joining_context(program, setup), setup.recompute_attention
        self._prefix, _ = layers_of(program)
        self._recomputed = set(_run_again(program, self._prefix))

    def items(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            if isinstance(item, Op) and item.kind is OpKind.ATTENTION:
                yield from self._of(item)

    def _of(self, op: Op) -> Iterator[MemoryChange]:
        query, keys = query_and_keys(op)
        scores = prod(query[:-1]) * keys[-2] * self._context
        width = DTYPE_BYTES.get(op.inputs[0].dtype, 2)
        if "backward" in op.name:
            runs_again = self._again or self._layer(op) in self._recomputed
            phase = Phase.RECOMPUTE if runs_again else Phase.FORWARD
            if self._again:
                yield from _forward(op, phase, scores, width, MemoryKind.ACTIVATION)
            yield from _backward(op, phase, scores, width)
        elif op.phase is Phase.FORWARD and (self._again or self._layer(op) in self._recomputed):
            yield from _forward(op, op.phase, scores, width, MemoryKind.TEMPORARY)
            yield from _ended(op, op.phase, scores, width, MemoryKind.TEMPORARY)
        else:
            yield from _forward(op, op.phase, scores, width, MemoryKind.ACTIVATION)

    def _layer(self, op: Op) -> int | None:
        return layer_index(op.module, self._prefix)


def _forward(op: Op, phase: Phase, scores: int, width: int, kind: MemoryKind) -> Iterator[MemoryChange]:
    """kind: of what its backward needs."""
    yield _change(op, scores * width, MemoryKind.TEMPORARY, phase, SCORES)
    yield _change(op, scores * width, kind, phase, SOFTMAX)
    yield _change(op, -scores * width, MemoryKind.TEMPORARY, phase, SCORES)
    yield _change(op, scores, kind, phase, MASK)
    yield _change(op, scores * width, kind, phase, DROPPED)


def _ended(op: Op, phase: Phase, scores: int, width: int, kind: MemoryKind) -> Iterator[MemoryChange]:
    """Of what _forward left."""
    for n_bytes, maker in ((scores * width, SOFTMAX), (scores, MASK), (scores * width, DROPPED)):
        yield _change(op, -n_bytes, kind, phase, maker)


def _backward(op: Op, made_in: Phase, scores: int, width: int) -> Iterator[MemoryChange]:
    """made_in: the phase of the forward that it is of."""
    passing = MemoryKind.TEMPORARY, Phase.BACKWARD
    yield _change(op, scores * width, *passing, DROPPED)
    yield _change(op, -scores * width, MemoryKind.ACTIVATION, made_in, DROPPED)
    yield _change(op, scores * width, *passing, SOFTMAX)
    yield _change(op, -scores * width, *passing, DROPPED)
    yield _change(op, -scores, MemoryKind.ACTIVATION, made_in, MASK)
    yield _change(op, -scores * width, MemoryKind.ACTIVATION, made_in, SOFTMAX)
    yield _change(op, -scores * width, *passing, SOFTMAX)


def _change(op: Op, n_bytes: int, kind: MemoryKind, phase: Phase, maker: str) -> MemoryChange:
    """One that goes is the youngest of those alike: of several attentions of a module, the last one's."""
    return MemoryChange(n_bytes, kind, phase, op.module, maker, nth=-1 if n_bytes < 0 else 0)


def _run_again(program: Program, prefix: str | None) -> Iterator[int]:
    """Layers whose attention the program itself runs again."""
    for block in program.blocks:
        for item in block.items:
            if isinstance(item, Op) and item.kind is OpKind.ATTENTION and item.phase is Phase.RECOMPUTE:
                layer = layer_index(item.module, prefix)
                if layer is not None:
                    yield from (layer + block.stride * repeat for repeat in range(block.times))
