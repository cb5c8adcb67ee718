"""What ranks tell each other: numbers, and tensors of any shape. All ranks of the group (None: of all) call
each."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie to go between the ranks of a group."""
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def largest(value: float) -> float:
    """Of all ranks' numbers; NaN counts as infinite."""
    return _reduced([value], dist.ReduceOp.MAX)[0]


def smallest(value: int) -> int:
    """Of all ranks' numbers."""
    return -int(largest(-value))


def all_summed(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, in one all-reduce; NaN counts as infinite. As many on each rank."""
    return _reduced(values, dist.ReduceOp.SUM)


def _reduced(values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
    numbers = torch.tensor(values, dtype=torch.float64, device=device_of(None))
    # a NaN on one rank must not hide behind another rank's number
    numbers = numbers.nan_to_num(nan=torch.inf, posinf=torch.inf)
    dist.all_reduce(numbers, op=op)
    return numbers.tolist()


def all_agree(answer: bool) -> bool:
    """Whether all ranks say yes."""
    return largest(float(not answer)) == 0


def gathered_ints(value: int, group: dist.ProcessGroup) -> list[int]:
    """All ranks' numbers, by rank."""
    numbers = [0] * group.size()
    dist.all_gather_object(numbers, value, group=group)
    return numbers


def gathered(tensors: Sequence[Tensor | None], group: dist.ProcessGroup) -> list[list[Tensor | None]]:
    """All ranks' tensors, by rank, in float64. As many on each rank; shapes may differ, and any may be
    missing."""
    # a copy, for a view would be sent with all of its storage
    own = [None if each is None else each.detach().double().cpu().clone() for each in tensors]
    every: list[list[Tensor | None]] = [[] for _ in range(group.size())]
    dist.all_gather_object(every, own, group=group)
    device = device_of(group)
    return [[None if each is None else each.to(device) for each in of_rank] for of_rank in every]
