"""Records the collectives that a block of code really issues, below every engine, at PyTorch's dispatcher.

An op is a collective where its schema takes a process group, or where it stands in a namespace whose ops do
(namespaces of symmetric memory move data between ranks by tensors alone). What the tables here don't name is
`unknown`, never left out. Sizes are this rank's; wire bytes by the formulas of core/collective.py.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.core.collective import CollectiveCall, CollectiveKind, off_mesh, wire_bytes
from shardwise.parallel.peers import told_of
from shardwise.torch_private import TorchDispatchMode, group_named, in_backward, is_higher_order, schema_of

NAMESPACES = frozenset(
    {"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"}
)
# Ops of those namespaces that move nothing between ranks
_LOCAL_NAMES = (
    "wait_tensor _wrap_tensor_autograd check_for_nan mesh_get_process_group _rendezvous "
    "memset32_ get_remote_tensors stream_write_value32_ nvshmem_wait_for_signal "
    "nccl_wait_for_signal nccl_wait_signal _async_input_mm"
)
LOCAL = frozenset(_LOCAL_NAMES.split())
_NAMES: dict[CollectiveKind, str] = {
    CollectiveKind.ALL_REDUCE: (
        "allreduce_ allreduce_coalesced_ all_reduce all_reduce_ all_reduce_coalesced "
        "all_reduce_coalesced_ one_shot_all_reduce one_shot_all_reduce_out one_shot_all_reduce_copy "
        "one_shot_all_reduce_copy_out two_shot_all_reduce_ two_shot_all_reduce_out "
        "multimem_all_reduce_ multimem_one_shot_all_reduce multimem_one_shot_all_reduce_out"
    ),
    CollectiveKind.ALL_GATHER: (
        "_allgather_base_ allgather_ allgather_coalesced_ allgather_into_tensor_coalesced_ "
        "all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced "
        "multimem_all_gather_out _low_contention_all_gather fused_all_gather_matmul "
        "fused_all_gather_scaled_matmul "
        "_low_contention_all_gather_ce_multicast _low_contention_all_gather_ce_multicast_out"
    ),
    CollectiveKind.REDUCE_SCATTER: (
        "_reduce_scatter_base_ reduce_scatter_ reduce_scatter_tensor_coalesced_ "
        "reduce_scatter_tensor reduce_scatter_tensor_out reduce_scatter_tensor_coalesced "
        "reduce_scatter_out nccl_reduce_scatter_offset _low_contention_reduce_scatter "
        "fused_matmul_reduce_scatter fused_scaled_matmul_reduce_scatter"
    ),
    CollectiveKind.ALL_TO_ALL: (
        "alltoall_base_ alltoall_ all_to_all_single shard_dim_alltoall nvshmem_all_to_all "
        "all_to_all_vdev all_to_all_vdev_2d all_to_all_vdev_2d_offset "
        "nccl_all_to_all_nd"
    ),
    CollectiveKind.BROADCAST: "broadcast_ broadcast nvshmem_broadcast memcpy_to_multicast_",
    CollectiveKind.REDUCE: "reduce_ tile_reduce multi_root_tile_reduce multimem_one_shot_reduce_out",
    CollectiveKind.GATHER: "gather_ gather_into_tensor_",
    CollectiveKind.SCATTER: "scatter_",
    CollectiveKind.SEND: (
        "send isend nvshmem_put nvshmem_put_with_signal nccl_put nccl_put_signal nccl_put_with_signal"
    ),
    CollectiveKind.RECV: "recv_ recv_any_source_ irecv nvshmem_get nvshmem_get_out nccl_get nccl_get_out",
    CollectiveKind.BARRIER: "barrier monitored_barrier_ _barrier",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_BATCH = "batch_p2p_ops"  # sends and receives in one
KNOWN = frozenset({*_KINDS, _BATCH})

# Where the whole tensor isn't simply the largest argument: the argument that is it, or (in parts) one rank's
# part of it
_WHOLE = {"alltoall_base_": 1, "alltoall_": 1, "memcpy_to_multicast_": 1} | dict.fromkeys(
    ("all_to_all_single", "shard_dim_alltoall", "nccl_all_to_all_nd"), 0
)
_PART = dict.fromkeys(
    (
        "all_gather_into_tensor",
        "all_gather_into_tensor_out",
        "all_gather_into_tensor_coalesced",
        "_low_contention_all_gather",
        "_low_contention_all_gather_ce_multicast",
        "_low_contention_all_gather_ce_multicast_out",
        "fused_all_gather_matmul",
        "fused_all_gather_scaled_matmul",
        "scatter_",
    ),
    0,
) | {"gather_": 1, "gather_into_tensor_": 1}
# A collective and a matmul in one: the matmul's result is one rank's part of what is summed
_PART_IS_RESULT = frozenset({"fused_matmul_reduce_scatter", "fused_scaled_matmul_reduce_scatter"})
FUSED = frozenset(name for name in KNOWN if name.startswith("fused_"))
"""Collectives that are a matmul too."""


@lru_cache(maxsize=4096)
def is_collective(func: Any) -> bool:
    """Whether a dispatcher op moves data between ranks, or waits for them."""
    if is_higher_order(func):
        return False
    schema = schema_of(func)
    namespace, _, name = schema.name.partition("::")
    if name in LOCAL:
        return False
    return namespace in NAMESPACES or any(
        argument.name == "group_name" or str(argument.type).endswith("c10d.ProcessGroup")
        for argument in schema.arguments
    )


def read_calls(
    name: str, args: Sequence[Any], out: Any, axes: Mapping[str, str], phase: str
) -> tuple[CollectiveCall, ...]:
    """The collectives that a dispatcher op (`name`: "c10d::allreduce_") issues with `args`, giving `out`.

    One, but for a batch of sends and receives. axes: group name -> axis name; other groups are named by their
    ranks.
    """
    base = name.partition("::")[2]
    group = _group_of(args)
    size = group.size() if group is not None else dist.get_world_size()
    axis = axes.get(group.group_name) if group is not None else None
    if axis is None:
        axis = off_mesh(dist.get_process_group_ranks(group) if group is not None else ())

    def call(
        kind: CollectiveKind, full: int, tensors: Sequence[Tensor], sends: int | None = None
    ) -> CollectiveCall:
        return CollectiveCall(
            kind=kind,
            axis=axis,
            axis_size=size,
            dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "uint8",
            payload_bytes=full,
            wire_bytes=wire_bytes(kind, full, size) if sends is None else float(sends),
            phase=phase,
            op=name if kind is CollectiveKind.UNKNOWN else "",
        )

    if base == _BATCH:
        ops, _, _, tensors, *_ = args
        return tuple(
            call(_KINDS[op], _bytes([tensor]), [tensor]) for op, tensor in zip(ops, tensors, strict=True)
        )
    kind = _KINDS.get(base, CollectiveKind.UNKNOWN)
    tensors = tensors_in(args)
    if kind is CollectiveKind.BARRIER:
        return (call(kind, 0, tensors),)
    if base in _WHOLE:
        sent = tensors_in(args[_WHOLE[base]])
        return (call(kind, _bytes(sent), sent, _sent_to_others(sent, args, group.rank() if group else 0)),)
    if base in _PART:
        full = size * _bytes(tensors_in(args[_PART[base]]))
    elif base in _PART_IS_RESULT:
        full = size * _bytes(tensors_in(out))
    else:
        full = max((_bytes(tensors_in(argument)) for argument in args), default=0)
    return (call(kind, full, tensors),)


def _sent_to_others(sent: Sequence[Tensor], args: Sequence[Any], rank: int) -> int | None:
    """Bytes of an all-to-all that leave the rank; None where it is cut evenly."""
    if len(sent) > 1:  # a tensor for each rank
        return _bytes(sent) - _bytes([sent[rank]])
    splits = [
        list(argument)
        for argument in args
        if isinstance(argument, (list, tuple)) and argument and _are_ints(argument)
    ]
    if not splits:
        return None
    rows: list[int] = splits[-1]  # (received, sent) rows per rank; the own part stays
    full = _bytes(sent)
    return full - (full // max(1, sum(rows))) * rows[rank]


class CollectiveRecorder(TorchDispatchMode):
    """`axes`: group name -> axis name. `phase`: set by the caller; what autograd runs is booked on "backward"
    whatever it says."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.calls: list[CollectiveCall] = []
        self.phase = "forward"
        self._axes = axes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # seen again as the collectives on local tensors that DTensor makes of it
        out = func(*args, **(kwargs or {}))
        if is_collective(func):
            phase = "backward" if in_backward() else self.phase
            # what goes between stages is told its phase: it is issued before that begins
            told = next(filter(None, map(told_of, tensors_in(args))), None)
            phase = str(told.phase) if told is not None else phase
            self.calls += read_calls(schema_of(func).name, args, out, self._axes, phase)
        return out


def _group_of(args: Sequence[Any]) -> Any:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            group = _unboxed(argument)
            if group is not None:
                return group
        if isinstance(argument, str):
            try:
                return group_named(argument)
            except (ValueError, RuntimeError):
                continue
    return None


def _unboxed(argument: torch.ScriptObject) -> Any:
    try:
        return torch.distributed.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):
        return None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, however deep in lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def _are_ints(values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
