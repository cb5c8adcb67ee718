"""Portion: what one rank computes of a global batch, in micro-batches."""

from collections.abc import Sequence
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
    reduce_once: FSDP reduces gradients in the last of them only. together: of one process that runs what so
    many ranks, each with a part of the batch, run together."""

    mesh: DeviceMesh | None = None
    part: BatchPart = field(default_factory=BatchPart)
    micro_batches: int = 1
    reduce_once: bool = False
    together: int = 1

    @classmethod
    def on(cls, mesh: DeviceMesh, micro_batches: int = 1, *, reduce_once: bool = False) -> Self:
        """This rank's."""
        return cls(mesh, part_of_batch(mesh_of(mesh), rank_in(mesh)), micro_batches, reduce_once)

    @property
    def of_one_process(self) -> "Portion":
        """The whole batch, in the micro-batches that all ranks have together: what is taken over a whole
        micro-batch, as a router's auxiliary loss is, is another one over other micro-batches."""
        return Portion(micro_batches=self.micro_batches, together=self.part.places)

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
        sequence, and of ranks together."""
        if self._is_dealt:
            whole = whole.index_select(0, self._order(len(whole)).to(whole.device))
        return micro_batches_of(whole, self.part, self.micro_batches)

    def joined(self, given: Sequence[Tensor]) -> Tensor:
        """What a model gave for each micro-batch, in the order of the batch or of this rank's part."""
        whole = torch.cat(list(given))
        if not self._is_dealt:
            return whole
        return whole.index_select(0, self._order(len(whole)).argsort().to(whole.device))

    @property
    def _is_dealt(self) -> bool:
        return self.together > 1 and self.micro_batches > 1

    def _order(self, batch: int) -> Tensor:
        """The sequences of the batch, micro-batch by micro-batch: of each rank's part the next ones."""
        return torch.arange(batch).view(self.together, self.micro_batches, -1).transpose(0, 1).flatten()

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
