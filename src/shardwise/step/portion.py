"""Portion: what one rank computes of a global batch, in micro-batches."""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.batch_part import BatchPart, part_of_batch
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.step.groups import mesh_of, rank_in

MicroBatches = list[tuple[Tensor, Tensor]]
"""Ids and labels of each, [B, S]."""


@dataclass(frozen=True, slots=True)
class Portion:
    """A rank's part of the global batch, in so many micro-batches. Without a mesh: one process, all of it.
    reduce_once: FSDP reduces gradients in the last of them only."""

    mesh: DeviceMesh | None = None
    part: BatchPart = field(default_factory=BatchPart)
    micro_batches: int = 1
    reduce_once: bool = False

    @classmethod
    def on(cls, mesh: DeviceMesh, micro_batches: int = 1, *, reduce_once: bool = False) -> Self:
        """This rank's."""
        return cls(mesh, part_of_batch(mesh_of(mesh), rank_in(mesh)), micro_batches, reduce_once)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that compute the same portion together."""
        assert self.mesh is not None
        return self.mesh.get_group(TENSOR_AXIS)

    @property
    def smallest_batch(self) -> int:
        """Sequences of a global batch of which every micro-batch has one."""
        return self.part.places * self.micro_batches

    def of(self, whole: Tensor) -> list[Tensor]:
        """The micro-batches of a tensor [B, S, ...] of the global batch. Views, but for a part of each
        sequence."""
        return micro_batches_of(whole, self.part, self.micro_batches)

    def cut(self, ids_BS: Tensor, labels_BS: Tensor) -> MicroBatches:
        """Those of ids and labels."""
        return list(zip(self.of(ids_BS), self.of(labels_BS), strict=True))


def micro_batches_of(whole: Tensor, part: BatchPart, micro_batches: int) -> list[Tensor]:
    """A part of a tensor [B, S, ...] of the global batch, in micro-batches."""
    batch, seq = whole.shape[:2]
    assert batch % (part.places * micro_batches) == 0, (whole.shape, part)
    assert seq % part.n_chunks == 0, (whole.shape, part)
    own = whole[part.sequences(batch)]
    if part.cuts_sequence:
        own = torch.cat([own[:, tokens] for tokens in part.tokens(seq)], dim=1)
    return list(own.chunk(micro_batches))
