"""What must be equal on all ranks: ids, initial weights, replicated parameters. Compared by digest; all ranks
must call.

Digest of a tensor with bits b_i read as integers: sum over i of b_i x m_i mod 2^64, with m_i an odd number
that depends on i in no simple way (multipliers in arithmetic progression would give values at places 0 and 5
the digest of the same values at places 2 and 3). It is order-sensitive, exact on every device, and no secret:
it finds ranks that drifted apart, not forgeries.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.finding import Finding, FindingKind
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.step.gradient_sums import is_cut_over
from shardwise.verify.exchange import device_of

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number (Knuth, TAOCP 3, 6.4)
_MIX = (
    (30, -4658895280553007687),
    (27, -7723592293110705685),
)  # shift, factor: splitmix64's finaliser (Steele, Lea, Flood 2014)
_CHUNK = 1 << 24
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> int:
    """64-bit digest of a plain tensor's shape-less bits."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=flat.device)
        total += (part * _multipliers(places)).sum()
    return int(total.item())


def _multipliers(places: Tensor) -> Tensor:
    """An odd 64-bit number for each place: splitmix64 without its last shift, lowest bit set."""
    mixed = (places + 1) * _GOLDEN
    for shift, factor in _MIX:
        unsigned = (mixed >> shift) & ((1 << (64 - shift)) - 1)  # torch's shift keeps the sign
        mixed = (mixed ^ unsigned) * factor
    return mixed | 1


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
