"""Under sequence parallelism a norm's gradient is averaged over the ranks, where it should be summed."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import Give, Mlp, Small, Take, shard, sums_in_backward

ABOUT = {
    "number": 4,
    "title": "A norm under sequence parallelism: its gradient is averaged",
    "sources": ["EleutherAI/gpt-neox#1259"],
    "symptom": "Norm weights agree over the ranks and move much slower than without sequence parallelism.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.norm.weight",
    "reason": "averaged",
    "before": "a hook averages the ranks' gradients, each of its own tokens",
    "after": "the hook sums them",
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
        group = mesh.get_group("tp")
        sums_in_backward(block.norm.weight, group, divide=group.size() if fault else 1.0)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
