"""What must be equal on all ranks: ids, initial weights, replicated parameters. Compared by digest; all ranks
must call."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.step.gradient_sums import is_cut_over
from shardwise.verify.exchange import device_of
from shardwise.watch.digest import digest as digest_of


def digest(tensor: Tensor) -> int:
    """Of a plain tensor's values in their order: see watch/digest.py."""
    return int(digest_of(tensor))


def replicated_parameters(model: nn.Module, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Local tensors of the parameters that the ranks of the tp axis, which are the group's, hold alike."""
    return held_alike(model, TENSOR_AXIS, group)


def held_alike(model: nn.Module, axis: str, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Local tensors of the parameters that the ranks along an axis, which are the group's, hold alike: those
    that no DTensor cuts over it."""
    return {
        name: parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for name, parameter in model.named_parameters()
        if not is_cut_over(parameter, axis, group)
    }


def disagreements(
    what: str, tensors: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup, axis: str = TENSOR_AXIS
) -> tuple[Finding, ...]:
    """A finding for each named tensor that isn't bit-equal on all ranks of the group, which is the axis'."""
    named = list(tensors)
    return disagreeing_digests(what, [(name, digest(tensor)) for name, tensor in named], group, axis)


def disagreeing_digests(
    what: str, digests: Iterable[tuple[str, int]], group: dist.ProcessGroup, axis: str = TENSOR_AXIS
) -> tuple[Finding, ...]:
    """The same for digests taken before."""
    named = list(digests)
    if not named or dist.get_world_size(group) == 1:
        return ()
    lowest = torch.tensor([value for _, value in named], dtype=torch.int64, device=device_of(group))
    highest = lowest.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return tuple(
        Finding(FindingKind.RANKS_DISAGREE, name, f"{what} are not equal on all {axis} ranks")
        for (name, _), differs in zip(named, (lowest != highest).tolist(), strict=True)
        if differs
    )
