"""How many tokens go to each expert: counted where the router's choice is real; where tensors hold nothing (a
trace on fake tensors, or on the meta device) taken to be balanced, or as uneven over the ranks that share
experts out as somebody assumes.

That is decided here and nowhere else. What it decides has the same form either way, so that no shape depends
on data in a trace. An assignment is one choice of one token; a dropped one has the number behind the last
expert's, as transformers' sentinel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shardwise.core.errors import OptionError
from shardwise.torch_private import FakeTensor


@dataclass(slots=True)
class _Assumed:
    expert_load: float
    has_ranks: bool = False


_assumed: ContextVar[_Assumed | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(expert_load: float) -> Iterator[None]:
    """Inside, where nobody knows what a router chose, the first rank of those that share experts out gets
    `expert_load` times as many assignments as the mean rank, and the others equally many. Raises OptionError
    at the end where no ranks do, and 1 isn't what was assumed."""
    assumed = _Assumed(expert_load)
    token = _assumed.set(assumed)
    try:
        yield
    finally:
        _assumed.reset(token)
    if expert_load != 1 and not assumed.has_ranks:
        raise OptionError(
            f"--expert-load {expert_load:g}: here no ranks share experts out. Leave it out, or give the mesh "
            "an axis ep, and the experts the style experts."
        )


def is_balanced_by_assumption(index: Tensor) -> bool:
    """Whether nobody knows what a router chose: its choice is a fake tensor, or a meta one."""
    return index.is_meta or isinstance(index, FakeTensor)


def balanced(assignments: int, experts: int) -> list[int]:
    """Assignments per expert where each gets as many as any other; the first get those that are left over."""
    each, rest = divmod(assignments, experts)
    return [each + (expert < rest) for expert in range(experts)]


def shared_out(assignments: int, experts: int, ranks: int) -> list[int]:
    """Assignments per expert where ranks share experts out in their order, each an equal number: as
    assuming() has it, and equal inside a rank. Raises OptionError for a load that ranks can't have."""
    assumed = _assumed.get()
    if assumed is None or assumed.expert_load == 1:
        return balanced(assignments, experts)
    load, assumed.has_ranks = assumed.expert_load, True
    if load > ranks:
        raise OptionError(
            f"--expert-load is {load:g}, and {ranks} ranks share the experts out: one that gets all has "
            f"{ranks} times the mean. Use 1 to {ranks}."
        )
    first = round(assignments * load / ranks)
    own = experts // ranks
    return balanced(first, own) + balanced(assignments - first, experts - own)


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
