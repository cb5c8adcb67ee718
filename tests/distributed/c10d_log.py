"""What torch.distributed hands to the backend, written down one level below every annotation of ours.

All ways in (dist.all_reduce, functional collectives, FSDP2, DTensor) end in the CPU kernels of the c10d ops;
those are replaced by ones that write down their arguments and call the original. Nothing here comes from
shardwise: kinds, sizes and bytes are told by the kernel and its tensors alone.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Issued:
    """One collective of one rank. payload_bytes: the whole tensor (a gather's output, a scatter's input, one
    rank's input of an all-to-all).

    sent_bytes: what this rank must send at least, by the algorithms that are optimal in bytes; exact for an
    all-to-all. group: the ranks in it, or a name for them.
    """

    kind: str
    group: str
    group_size: int
    dtype: str
    payload_bytes: int
    sent_bytes: float
    phase: str


# kernel -> (kind, position of the argument that holds the whole tensor)
_KERNELS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    "reduce_": ("reduce", 0),
    "barrier": ("barrier", 0),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}


@contextmanager
def writing_down(issued: list[Issued], phase: Callable[[], str]) -> Iterator[None]:
    """Appends every collective of this process to `issued`, in the order in which the backend gets them."""
    library = torch.library.Library("c10d", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a kernel is overridden
        for name, (kind, whole) in _KERNELS.items():
            library.impl(name, _kernel(name, kind, whole, issued, phase), "BackendSelect")
    try:
        yield
    finally:
        library._destroy()


def _kernel(
    name: str, kind: str, whole: int, issued: list[Issued], phase: Callable[[], str]
) -> Callable[..., Any]:
    op = getattr(torch.ops.c10d, name).default
    arguments = op._schema.arguments

    def kernel(*given: Any) -> Any:
        args = (*given, *(argument.default_value for argument in arguments[len(given) :]))
        group = next(unboxed for arg in args if (unboxed := _group(arg)) is not None)
        tensors = _tensors(args[whole])
        payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        size = group.size()
        issued.append(
            Issued(
                kind, ranks_of(group), size, dtype, payload, _sent(name, kind, args, group, payload), phase()
            )
        )
        return op._op_dk(
            torch._C.DispatchKey.CPU, *args
        )  # frees the interpreter's lock, which gloo's threads need

    return kernel


def _sent(name: str, kind: str, args: tuple[Any, ...], group: dist.ProcessGroup, payload: int) -> float:
    n, me = group.size(), group.rank()
    match kind:
        case "all_reduce":
            return 2 * payload * (n - 1) / n
        case "all_gather" | "reduce_scatter":
            return payload * (n - 1) / n
        case "all_to_all" if name == "alltoall_base_":
            sent: Tensor = args[1]
            splits = args[4] or [len(sent) // n] * n
            to_others = [part for rank, part in enumerate(sent.split(splits)) if rank != me]
            return float(sum(part.numel() * part.element_size() for part in to_others))
        case "broadcast" | "send":
            return float(payload)
        case "recv":
            return 0.0
        case _:
            raise AssertionError(f"a training step has no {name}")


def ranks_of(group: dist.ProcessGroup) -> str:
    """The ranks of a group, as one text. Groups of the same ranks are many: DTensor's caches hand out those
    of any equal mesh."""
    return " ".join(map(str, dist.get_process_group_ranks(group)))


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except RuntimeError:  # a ReduceOp
            return None
    return None


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)]
