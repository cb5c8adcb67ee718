"""Records the collectives that a block of code really issues, on both engines: below every style, at PyTorch's dispatcher.

Sizes are this rank's; wire bytes by the formulas of core/collective.py. FSDP2's and DTensor's collectives are seen too, by group.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.core.collective import CollectiveCall, CollectiveKind, wire_bytes

_KINDS = {
    "c10d::allreduce_": CollectiveKind.ALL_REDUCE,
    "c10d::_allgather_base_": CollectiveKind.ALL_GATHER,
    "c10d::allgather_": CollectiveKind.ALL_GATHER,
    "c10d::_reduce_scatter_base_": CollectiveKind.REDUCE_SCATTER,
    "c10d::reduce_scatter_": CollectiveKind.REDUCE_SCATTER,
    "c10d::alltoall_base_": CollectiveKind.ALL_TO_ALL,
    "c10d::alltoall_": CollectiveKind.ALL_TO_ALL,
    "c10d::broadcast_": CollectiveKind.BROADCAST,
    "_c10d_functional::all_reduce": CollectiveKind.ALL_REDUCE,
    "_c10d_functional::all_reduce_": CollectiveKind.ALL_REDUCE,
    "_c10d_functional::all_gather_into_tensor": CollectiveKind.ALL_GATHER,
    "_c10d_functional::all_gather_into_tensor_out": CollectiveKind.ALL_GATHER,
    "_c10d_functional::reduce_scatter_tensor": CollectiveKind.REDUCE_SCATTER,
    "_c10d_functional::all_to_all_single": CollectiveKind.ALL_TO_ALL,
    "_c10d_functional::broadcast": CollectiveKind.BROADCAST,
    "_dtensor::shard_dim_alltoall": CollectiveKind.ALL_TO_ALL,
}


def read_call(name: str, args: tuple[Any, ...], axes: Mapping[str, str], phase: str) -> CollectiveCall | None:
    """The collective that the dispatcher op `name` (such as "c10d::allreduce_") issues with `args`; None if it is none, or not on `axes`.

    axes: group name -> axis name.
    """
    kind = _KINDS.get(name)
    if kind is None:
        return None
    group = _group_of(args)
    if group is None or group.group_name not in axes:
        return None
    tensors = [tensor for argument in args for tensor in _tensors(argument)]
    size = group.size()
    sends: int | None = None
    if kind is CollectiveKind.ALL_TO_ALL:
        sent = tensors[-1] if name.startswith("c10d::") else tensors[0]
        full = _bytes(sent)
        splits = [
            list(argument)
            for argument in args
            if isinstance(argument, (list, tuple)) and argument and _are_ints(argument)
        ]
        if splits:  # (received, sent) rows per rank; the own part stays
            rows = splits[-1]
            sends = full - (full // max(1, sum(rows))) * rows[group.rank()]
    elif kind is CollectiveKind.BROADCAST:
        full = _bytes(tensors[0])
    elif kind is CollectiveKind.ALL_GATHER and not name.startswith("c10d::"):
        full = _bytes(tensors[0]) * size  # functional: its input is the shard
    else:  # the largest is the whole tensor: a gather's output, a scatter's input
        full = max(sum(_bytes(t) for t in _tensors(argument)) for argument in args)
    return CollectiveCall(
        kind=kind,
        axis=axes[group.group_name],
        axis_size=size,
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        payload_bytes=full,
        wire_bytes=float(sends) if sends is not None else wire_bytes(kind, full, size),
        phase=phase,
    )


class CollectiveRecorder(TorchDispatchMode):
    """`axes`: group name -> axis name. Collectives on other groups are not this mesh's and are left out. `phase`: set by the caller;
    what autograd runs is booked on "backward" whatever it says."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.calls: list[CollectiveCall] = []
        self.phase = "forward"
        self._axes = axes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # seen again as the collectives on local tensors that DTensor makes of it
        if func._schema.name in _KINDS:
            phase = "backward" if torch._C._current_graph_task_id() != -1 else self.phase
            call = read_call(func._schema.name, args, self._axes, phase)
            if call is not None:
                self.calls.append(call)
        return func(*args, **(kwargs or {}))


def _group_of(args: tuple[Any, ...]) -> Any:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            group = _unboxed(argument)
            if group is not None:
                return group
        if isinstance(argument, str):
            try:
                return torch.distributed.distributed_c10d._resolve_process_group(argument)  # type: ignore[attr-defined, arg-type]
            except (ValueError, RuntimeError):
                continue
    return None


def _unboxed(argument: torch.ScriptObject) -> Any:
    try:
        return torch.distributed.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):
        return None


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for item in argument for tensor in _tensors(item)]
    return []


def _are_ints(values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
