"""What ranks tell each other: numbers, and tensors of any shape, by plain collectives. All ranks of the group
(None: of all) call each."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie to go between the ranks of a group."""
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def largest(value: float, group: dist.ProcessGroup | None = None) -> float:
    """Of all ranks' numbers; NaN counts as infinite."""
    return _reduced([value], dist.ReduceOp.MAX, group)[0]


def all_summed(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, in one all-reduce; NaN counts as infinite. As many on each rank."""
    return _reduced(values, dist.ReduceOp.SUM, None) if values else []


def _reduced(
    values: Sequence[float], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> list[float]:
    # a NaN on one rank must not hide behind another rank's number
    numbers = torch.tensor(values, dtype=torch.float64, device=device_of(group)).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    dist.all_reduce(numbers, op=op, group=group)
    return numbers.tolist()


def all_agree(answer: bool) -> bool:
    """Whether all ranks say yes."""
    return largest(float(not answer)) == 0


def gathered_ints(value: int, group: dist.ProcessGroup) -> list[int]:
    """All ranks' numbers, by rank."""
    own = torch.tensor([value], dtype=torch.int64, device=device_of(group))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return [int(each.item()) for each in every]


def gathered(tensors: Sequence[Tensor | None], group: dist.ProcessGroup) -> list[list[Tensor | None]]:
    """All ranks' tensors, by rank, in float64. As many on each rank; shapes may differ, and any may be
    missing."""
    device = device_of(group)
    shapes: list[int] = []
    for tensor in tensors:
        shapes += [-1] if tensor is None else [tensor.dim(), *tensor.shape]
    nothing = torch.empty(0, dtype=torch.float64, device=device)
    present = [tensor.detach().double().flatten().to(device) for tensor in tensors if tensor is not None]
    flat = torch.cat([nothing, *present])
    lists = [_from_all(torch.tensor(shapes, dtype=torch.int64, device=device), group), _from_all(flat, group)]
    return [_unpacked(description.tolist(), values) for description, values in zip(*lists, strict=True)]


def _from_all(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    sizes = gathered_ints(len(own), group)
    padded = torch.cat([own, own.new_zeros(max(sizes) - len(own))])
    every = [torch.empty_like(padded) for _ in sizes]
    if max(sizes):
        dist.all_gather(every, padded, group=group)
    return [each[:size] for each, size in zip(every, sizes, strict=True)]


def _unpacked(description: list[int], values: Tensor) -> list[Tensor | None]:
    tensors: list[Tensor | None] = []
    place = first = 0
    while place < len(description):
        dims = description[place]
        place += 1
        if dims < 0:
            tensors.append(None)
            continue
        shape = description[place : place + dims]
        place += dims
        size = prod(shape)
        tensors.append(values[first : first + size].view(shape))
        first += size
    return tensors
