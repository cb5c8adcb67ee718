"""Shards of an activation are put together by torch.distributed.all_gather, which has no backward: only what
this rank wrote back into the result keeps its past."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import Give, Mlp, Small, Take, shard, sums_in_backward

ABOUT = {
    "number": 15,
    "title": "A gather that isn't differentiable cuts off the backward",
    "sources": ["3dlg-hcvc/DuoduoCLIP#10", "HobbitLong/SupContrast#26"],
    "symptom": "The forward is right with any number of ranks; training with several is worse than with one.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.norm.weight",
    "reason": "nothing arrives",
    "before": "dist.all_gather fills new tensors, which know nothing of the shards",
    "after": "an autograd function gathers, and its backward gives each rank its part",
}


class Sequences(Mlp):
    """Its norm sees this rank's part of the sequence; the rest of the block sees all of it."""

    mesh: DeviceMesh | None = None
    keeps_past = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.mesh is None:
            return super().forward(x_BSD)
        group = self.mesh.get_group("tp")
        part_BSD = self.norm(Take.apply(x_BSD, 1, group))
        if self.keeps_past:
            whole_BSD = Give.apply(part_BSD, 1, group, False)
        else:
            parts = [torch.empty_like(part_BSD) for _ in range(group.size())]
            dist.all_gather(parts, part_BSD.detach().contiguous(), group=group)
            whole_BSD = torch.cat(parts, 1)
        out: Tensor = self.down(torch.tanh(self.up(whole_BSD)))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Sequences()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        block.mesh, block.keeps_past = mesh, not fault
        if not fault:
            sums_in_backward(block.norm.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
