"""Runs: what is known of a loop on one process and on ranks, before anybody says why they differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.drift import Drift
from shardwise.verify.loop.differences import Allowed, Off
from shardwise.verify.loop.record import Record


@dataclass(frozen=True, slots=True)
class Runs:
    """All that is known. data: axes whose ranks see other parts of the batch, of `parts` parts; own: what one
    process does on this rank's part alone; None where there is one part."""

    model: nn.Module
    mesh: DeviceMesh
    data: tuple[str, ...]
    parts: int
    sharded: Record
    whole: Record
    own: Record | None
    allowed: Allowed
    off: Off
    drifts: Sequence[Drift]
