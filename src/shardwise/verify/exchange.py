"""What ranks tell each other: numbers, and tensors of any shape, by plain collectives. All ranks of the group call each."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must lie to go between the ranks of a group."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(group) == "nccl"
        else torch.device("cpu")
    )


def largest(value: float, group: dist.ProcessGroup) -> float:
    """Of all ranks' numbers; NaN counts as infinite."""
    return all_largest([value], group)[0]


def all_largest(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """largest() of each, in one all-reduce. As many on each rank."""
    if not values:
        return []
    # a NaN on one rank must not hide behind another rank's number
    tensor = torch.nan_to_num(
        torch.tensor(values, dtype=torch.float64, device=device_of(group)), nan=torch.inf, posinf=torch.inf
    )
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    found: list[float] = tensor.tolist()
    return found


def gathered_ints(value: int, group: dist.ProcessGroup) -> list[int]:
    """All ranks' numbers, by rank."""
    own = torch.tensor([value], dtype=torch.int64, device=device_of(group))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [int(each.item()) for each in found]


def gathered(tensors: Sequence[Tensor | None], group: dist.ProcessGroup) -> list[list[Tensor | None]]:
    """All ranks' tensors, by rank, in float64. As many on each rank; shapes may differ, and any may be missing."""
    device = device_of(group)
    shapes: list[int] = []
    for tensor in tensors:
        shapes += [-1] if tensor is None else [tensor.dim(), *tensor.shape]
    nothing = torch.empty(0, dtype=torch.float64, device=device)
    flat = torch.cat(
        [
            nothing,
            *(tensor.detach().double().flatten().to(device) for tensor in tensors if tensor is not None),
        ]
    )
    lists = [_from_all(torch.tensor(shapes, dtype=torch.int64, device=device), group), _from_all(flat, group)]
    return [_unpacked(description.tolist(), values) for description, values in zip(*lists, strict=True)]


def _from_all(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    sizes = gathered_ints(len(own), group)
    padded = torch.cat([own, own.new_zeros(max(sizes) - len(own))])
    found = [torch.empty_like(padded) for _ in sizes]
    if max(sizes):
        dist.all_gather(found, padded, group=group)
    return [each[:size] for each, size in zip(found, sizes, strict=True)]


def _unpacked(description: list[int], values: Tensor) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    place = first = 0
    while place < len(description):
        dims = description[place]
        place += 1
        if dims < 0:
            found.append(None)
            continue
        shape = description[place : place + dims]
        place += dims
        size = prod(shape)
        found.append(values[first : first + size].view(shape))
        first += size
    return found
