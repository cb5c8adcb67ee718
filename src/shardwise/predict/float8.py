"""float8: which matmuls of a step run in float8, and the casts that this costs beside them. No torch.

A layer's linears multiply in float8; what lies outside the layers (the head) stays in the step's dtype, as
torchao's filter, Megatron and Transformer Engine leave it. Both matrices of each matmul are cast first, and
the tensor cores take float8 along the summed dim alone, so that a backward needs them transposed. Bytes that
the fused kernels of casts move for an element (of 2 bytes, cast to 1):

                              forward, each matrix        backward, the gradient   backward, the other one
    delayed (scales of        2 + 1 + 1: cast and         4, once for both         0: made in the forward
    steps before)             transposed in one pass      matmuls
    tensorwise (of now)       2: largest; 2 + 1: cast     5, and 1 + 1 transposed  1 + 1: transposed
    rowwise (of each row)     2 + 1: the row fits a       3 along rows, 2 + 2 + 1  2 + 2 + 1: along columns,
                              block                       along columns            largest first

A matrix that several matmuls in a row take is cast once (torch.compile finds it). One that was gathered over
tp right before is cast by each rank before it is sent, if one scale holds for all of it: so the gather sends
half the bytes. torchao's FSDP gathers weights so too (enable_fsdp_float8_all_gather, which needs tensorwise
scaling; torchtitan's tables have it on). Sources: torchao/float8 (config.py, float8_ops.py,
float8_tensor_parallel.py, fsdp_utils.py); Transformer Engine, module/layernorm_linear.py and linear.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from shardwise.core.collective import CollectiveKind
from shardwise.core.grouped import GROUPED
from shardwise.core.layer_name import layer_index
from shardwise.core.mesh import Role, role_of
from shardwise.core.prediction import Scaling, Setup
from shardwise.core.program import IN_LAYERS, Collective, Item, Op, OpKind, Phase, TensorSpec

CAST = "float8 cast"
"""The name of the ops made here."""

ROWWISE_SHARE = 0.95
"""Of the rate of one scale a tensor: the middle of "most shapes are within 90-100 % of tensor-wise" (PyTorch
issue 147971, H100). What it loses beyond a summed dim of 16384 (issue 153809) isn't published as numbers."""

FORWARD_BYTES = {Scaling.DELAYED: 4.0, Scaling.TENSORWISE: 5.0, Scaling.ROWWISE: 3.0}
BACKWARD_BYTES = {  # of the gradient in each of its two matmuls, and of the other matrix
    Scaling.DELAYED: (2.0, 0.0),
    Scaling.TENSORWISE: (3.5, 2.0),
    Scaling.ROWWISE: (4.0, 5.0),
}


def with_casts(items: Iterable[Item], setup: Setup, prefix: str | None) -> Iterator[Item]:
    """The items, a cast before each matmul that runs in float8. prefix: of the row of layers; None: all are
    taken for one."""
    if setup.matmul_dtype != "float8":
        yield from items
        return
    seen = _Seen()
    for item in items:
        match item:
            case Collective():
                seen.enter(item.phase)
                if _is_gather(item):
                    seen.gathers(item.call.payload_bytes // 2, item.call.axis_size)
            case Op():
                seen.enter(item.phase)
                if is_float8(item, setup, prefix):
                    yield _cast(item, setup.scaling, seen)
                seen.runs(item, is_cast=is_float8(item, setup, prefix))
            case _:
                pass
        yield item


class _Seen:
    """What is there of matrices in float8 at a place of a pass. Matrices are known by their shapes, so one is
    forgotten as soon as anything else of its shape is made.

    elements, ranks: of what was last gathered over tp, and by how many ranks."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._forget()

    def _forget(self) -> None:
        self.elements, self.ranks = 0, 1
        self._cast: set[TensorSpec] = set()
        self._last: TensorSpec | None = None

    def enter(self, phase: Phase) -> None:
        """What a recompute takes is cast again."""
        if phase is not self._phase:
            self._phase = phase
            self._forget()

    def gathers(self, elements: int, ranks: int) -> None:
        self.elements, self.ranks = elements, ranks
        self._cast = {spec for spec in self._cast if prod(spec.shape) != elements}

    def has(self, matrix: TensorSpec) -> bool:
        """Whether a matmul before took the same matrix."""
        return matrix == self._last or matrix in self._cast

    def runs(self, op: Op, *, is_cast: bool) -> None:
        if op.kind is OpKind.COPY:  # it makes nothing that wasn't there
            return
        taken = matrices_of(op)[0] if is_cast and op.phase is not Phase.BACKWARD else None
        if taken is not None:
            self._cast.add(taken)
        self._last = taken
        for made in op.outputs:
            self._cast.discard(made)
            if prod(made.shape) == self.elements:
                self.elements, self.ranks = 0, 1


def matrices_of(op: Op) -> tuple[TensorSpec, TensorSpec]:
    """The two that it multiplies; a bias comes before them."""
    start = 1 if op.name.endswith("addmm") else 0
    first, second = op.inputs[start : start + 2]
    return first, second


def is_float8(op: Op, setup: Setup, prefix: str | None) -> bool:
    """Whether the op is a matmul of a layer's linear, in a setup that multiplies those in another dtype."""
    if setup.matmul_dtype is None or op.kind is not OpKind.MATMUL or op.phase not in IN_LAYERS:
        return False
    is_linear = op.name == GROUPED or op.name.removeprefix("aten::") in ("mm", "addmm")
    return is_linear and (prefix is None or layer_index(op.module, prefix) is not None)


def gathers_float8(item: Collective, setup: Setup, prefix: str | None) -> bool:
    """Whether an all-gather sends what was cast already: over tp of a layer's inputs, with torchao over fsdp
    of its weights too."""
    scaling, role = setup.scaling, role_of(item.call.axis)
    of_weights = role is Role.SHARDS_PARAMETERS and scaling is Scaling.TENSORWISE
    return (
        setup.matmul_dtype == "float8"
        and scaling is not Scaling.ROWWISE
        and item.call.kind is CollectiveKind.ALL_GATHER
        and (of_weights or role is Role.CUTS_TENSORS)
        and item.phase in IN_LAYERS
        and (prefix is None or layer_index(item.module, prefix) is not None)
    )


def _is_gather(item: Collective) -> bool:
    return item.call.kind is CollectiveKind.ALL_GATHER and role_of(item.call.axis) is Role.CUTS_TENSORS


def _cast(op: Op, scaling: Scaling, seen: _Seen) -> Op:
    matrices = matrices_of(op)
    first, second = (prod(spec.shape) for spec in matrices)
    sizes = [0.0 if seen.has(matrices[0]) else float(first), float(second)]
    if seen.elements == first and scaling is not Scaling.ROWWISE:
        sizes[0] /= seen.ranks
    each = BACKWARD_BYTES[scaling] if op.phase is Phase.BACKWARD else (FORWARD_BYTES[scaling],) * 2
    n_bytes = round(sum(size * own for size, own in zip(sizes, each, strict=True)))
    spec = TensorSpec("float8", (round(sum(sizes)),))
    return replace(
        op,
        name=CAST,
        kind=OpKind.COPY,
        inputs=(spec,),
        outputs=(spec,),
        flops=0,
        read_bytes=n_bytes,
        write_bytes=0,
    )
