"""Portion: what one rank computes of a global batch, in micro-batches."""

from dataclasses import dataclass
from typing import Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.mesh import TENSOR_AXIS, sees_other_tokens

MicroBatches = list[tuple[Tensor, Tensor]]
"""Ids and labels of each, [B, S]."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Part `place` of `places` equal ones along the batch, in so many micro-batches. Without a mesh: one
    process, all of it."""

    mesh: DeviceMesh | None = None
    place: int = 0
    places: int = 1
    micro_batches: int = 1

    @classmethod
    def on(cls, mesh: DeviceMesh, micro_batches: int = 1) -> Self:
        """This rank's."""
        place, places = 0, 1
        for name in mesh.mesh_dim_names or ():
            if sees_other_tokens(name):
                size = mesh[name].size()
                place, places = place * size + mesh.get_local_rank(name), places * size
        return cls(mesh, place, places, micro_batches)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that compute the same portion together."""
        assert self.mesh is not None
        return self.mesh.get_group(TENSOR_AXIS)

    @property
    def smallest_batch(self) -> int:
        """Sequences of a global batch of which every micro-batch has one."""
        return self.places * self.micro_batches

    def of(self, whole: Tensor) -> list[Tensor]:
        """The micro-batches of a tensor whose first dim is the global batch. Views, not copies."""
        assert len(whole) % self.smallest_batch == 0, (whole.shape, self)
        return list(whole.chunk(self.places)[self.place].chunk(self.micro_batches))

    def cut(self, ids_BS: Tensor, labels_BS: Tensor) -> MicroBatches:
        """Those of ids and labels."""
        return list(zip(self.of(ids_BS), self.of(labels_BS), strict=True))
