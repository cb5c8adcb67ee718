"""How many tokens go to each expert: counted where the router's choice is real, and taken to be balanced
where tensors hold nothing (a trace on fake tensors, or on the meta device).

That is decided here and nowhere else. What it decides has the same form either way, so that no shape depends
on data in a trace. An assignment is one choice of one token; a dropped one has the number behind the last
expert's, as transformers' sentinel.
"""

from itertools import pairwise

import torch
from torch import Tensor

from shardwise.torch_private import FakeTensor


def is_balanced_by_assumption(index: Tensor) -> bool:
    """Whether nobody knows what a router chose: its choice is a fake tensor, or a meta one."""
    return index.is_meta or isinstance(index, FakeTensor)


def balanced(assignments: int, experts: int) -> list[int]:
    """Assignments per expert where each gets as many as any other; the first get those that are left over."""
    each, rest = divmod(assignments, experts)
    return [each + (expert < rest) for expert in range(experts)]


def ends_of(sorted_index: Tensor, experts: int) -> Tensor:
    """Where each expert's rows end among assignments that are sorted by expert: [experts], int32."""
    last = torch.arange(experts, device=sorted_index.device)
    return torch.searchsorted(sorted_index, last, right=True, out_int32=True)


def counts_of(sorted_index: Tensor, experts: int) -> list[int]:
    """Assignments per expert, on the host. sorted_index: those of one dim, sorted; dropped ones aren't
    counted."""
    if is_balanced_by_assumption(sorted_index):
        return balanced(sorted_index.numel(), experts)
    ends = [0, *ends_of(sorted_index, experts).tolist()]
    return [end - start for start, end in pairwise(ends)]
