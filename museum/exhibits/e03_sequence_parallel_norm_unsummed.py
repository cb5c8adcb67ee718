"""Under sequence parallelism a norm sees a part of the sequence on each rank; nobody sums its gradient."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import Give, Mlp, Small, Take, shard, sums_in_backward

ABOUT = {
    "number": 3,
    "title": "A norm under sequence parallelism: its gradient isn't summed",
    "sources": ["NVIDIA/Megatron-LM#1446", "NVIDIA/TransformerEngine#435", "Dao-AILab/flash-attention#625"],
    "symptom": "The norm's gradient, and soon its weight, differs between tensor-parallel ranks.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.norm.weight",
    "reason": "parts not summed",
    "before": "each rank keeps the gradient of its own tokens",
    "after": "the norm's gradient is all-reduced over tp",
}


class Sequences(Mlp):
    """Its norm sees this rank's part of the sequence; the rest of the block sees all of it."""

    mesh: DeviceMesh | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.mesh is None:
            return super().forward(x_BSD)
        group = self.mesh.get_group("tp")
        part_BSD = self.norm(Take.apply(x_BSD, 1, group))
        whole_BSD = Give.apply(part_BSD, 1, group, False)  # up sums what comes back to it
        out: Tensor = self.down(torch.tanh(self.up(whole_BSD)))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Sequences()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        block.mesh = mesh
        if not fault:
            sums_in_backward(block.norm.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
