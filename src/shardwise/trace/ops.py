"""An op of PyTorch's dispatcher as an Op: its kind, shapes, FLOPs and bytes, by what it says of itself and
the catalogue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardwise.core.op_names import FSDP_COPY_IN
from shardwise.core.program import Op, OpKind, TensorSpec
from shardwise.parallel.recorder import is_collective, tensors_in
from shardwise.torch_private import FakeTensor, schema_of, storage_key
from shardwise.trace.catalogue import flops_of, kind_of, name_on, traffic_of
from shardwise.trace.place import Place

# neither kernels nor memory: bookkeeping of the dispatcher, the profiler and the functional collectives
SILENT = frozenset(
    {
        "prim::device",
        "profiler::_record_function_enter_new",
        "profiler::_record_function_exit",
        "aten::promote_types",
    }
)
# memory without a kernel
ALLOCATIONS = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_")
)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a dispatcher op says of itself: its name, the positions of the arguments that it writes, PyTorch's
    tags, and where attention is told that it is causal."""

    name: str
    writes: tuple[int, ...]
    writes_keywords: tuple[str, ...]
    is_collective: bool
    tags: frozenset[str]
    causal_at: int | None = None

    def is_causal(self, args: Sequence[Any]) -> bool:
        at = self.causal_at
        return at is not None and at < len(args) and args[at] is True


@lru_cache(maxsize=4096)
def signature_of(func: Any) -> Signature:
    schema = schema_of(func)
    written = [
        (index, argument)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    ]
    return Signature(
        schema.name,
        tuple(index for index, argument in written if not argument.kwarg_only),
        tuple(argument.name for _, argument in written if argument.kwarg_only),
        is_collective(func),
        frozenset(tag.name for tag in func.tags),
        next((at for at, argument in enumerate(schema.arguments) if argument.name == "is_causal"), None),
    )


@dataclass(frozen=True, slots=True)
class Work:
    """Tensors of one op: what it takes, what it makes anew, and which of its inputs it writes."""

    inputs: Sequence[Tensor]
    made: Sequence[Tensor]
    written: Sequence[Tensor] = ()


def work_of(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]
) -> Work | None:
    """None for a view."""
    inputs = tensors_in(args) + tensors_in(kwargs)
    # into its place in the gathered tensor, which is its last input; what it gives are views of that
    if signature.name == FSDP_COPY_IN:
        return Work(inputs[:-1], outputs[:1])
    written = [t for index in signature.writes if index < len(args) for t in tensors_in(args[index])]
    written += [t for keyword in signature.writes_keywords for t in tensors_in(kwargs.get(keyword))]
    known = {storage_key(tensor.untyped_storage()) for tensor in inputs}
    made = [tensor for tensor in outputs if storage_key(tensor.untyped_storage()) not in known]
    return Work(inputs, made, written) if made or written else None


class Ops:
    """Ops as `device` runs them."""

    def __init__(self, device: str, place: Place) -> None:
        self._device = device
        self._place = place
        self._specs: dict[tuple[torch.dtype, torch.Size], TensorSpec] = {}

    def op(self, signature: Signature, args: Sequence[Any], work: Work, *, is_half: bool | None = None) -> Op:
        """is_half: whether attention has half of its pairs to meet, where the signature doesn't tell."""
        name = signature.name
        inputs, outputs = tuple(map(self._spec, work.inputs)), tuple(map(self._spec, work.made))
        written = {id(tensor) for tensor in work.written}
        reads, writes = traffic_of(
            name,
            inputs,
            [_n_bytes(tensor) for tensor in work.inputs],
            [_n_bytes(tensor) for tensor in work.made],
            [_n_bytes(tensor) for tensor in work.inputs if id(tensor) in written],
        )
        shown = name_on(name, self._device, inputs)
        is_told = not shown.startswith("unknown")
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in (*work.inputs, *work.made))
        return Op(
            shown,
            kind_of(name, self._device, signature.tags) if is_told else OpKind.UNKNOWN,
            self._place.phase,
            self._place.module,
            inputs,
            outputs,
            flops_of(name, inputs, outputs, causal=signature.is_causal(args) if is_half is None else is_half),
            reads,
            writes,
            on_host=self._device != "cpu" and not is_fake,
        )

    def copy_from_host(self, tensor: Tensor) -> Op:
        """The op that brings a tensor onto the device."""
        spec, n_bytes = self._spec(tensor), _n_bytes(tensor)
        place = self._place
        return Op(
            "aten::_to_copy",
            OpKind.COPY,
            place.phase,
            place.module,
            (spec,),
            (spec,),
            0,
            n_bytes,
            n_bytes,
            True,
        )

    def _spec(self, tensor: Tensor) -> TensorSpec:
        key = (tensor.dtype, tensor.shape)
        known = self._specs.get(key)
        if known is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            known = self._specs[key] = TensorSpec(dtype, tuple(int(size) for size in tensor.shape))
        return known


def _n_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has: an expanded dim counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size <= 1 else 1
    return count * tensor.element_size()
