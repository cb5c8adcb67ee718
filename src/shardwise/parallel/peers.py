"""Tensors that go to one other rank, or come from one: who gave them, and why, rides on the tensor itself,
since torch's schedules issue them later, several at once; and sums over two ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.core.program import Phase


@dataclass(frozen=True, slots=True)
class Told:
    """Of a tensor that goes to one other rank, or comes from one: the module that gave it, the phase, and
    why."""

    module: str
    phase: Phase
    reason: str


_TOLD = "_shardwise_told"


def tell(tensor: Tensor, module: str, phase: Phase, reason: str) -> None:
    """Says of a tensor why it will be sent or received, wherever that is issued."""
    setattr(tensor, _TOLD, Told(module, phase, reason))


def told_of(tensor: Tensor) -> Told | None:
    """What tell() said."""
    return getattr(tensor, _TOLD, None)


def add_peers(x: Tensor, group: dist.ProcessGroup, peer: int, module: str, phase: Phase, reason: str) -> None:
    """Adds to x, in place, what another rank of the group has of it; both must call. Equal on both to the
    last bit. reason: a sentence."""
    received = torch.empty_like(x)
    sent = x.contiguous()
    for tensor in (sent, received):
        tell(tensor, module, phase, reason)
    ops = [
        dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    x.add_(received)
