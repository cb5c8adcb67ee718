"""A region ends in torch.distributed.nn's all-reduce, whose backward sums too: what comes back is whole
already, so each block below is off by one more factor."""

import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Mlp, Row, Small, local, shard

ABOUT = {
    "number": 14,
    "title": "A differentiable all-reduce sums gradients that are whole",
    "sources": ["THUDM/slime#1748", "pytorch/pytorch#160285", "mlfoundations/open_clip#616"],
    "symptom": "Gradients are a multiple of what they should be, more so the deeper; loss curves are "
    "equivalent under Adam.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.1.down.weight",
    "reason": "summed too often",
    "before": "the backward of the sum all-reduces a gradient that every rank has whole",
    "after": "the backward of the sum hands the gradient on",
}


class Twice(Row):
    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(x)
        out: Tensor = dist_functional.all_reduce(F.linear(x, local(self.weight)), group=self.group)
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    blocks = [Mlp(), Mlp()]
    if fault:
        for block in blocks:
            block.down = Twice(INNER, WIDTH, bias=False)
    model = Small(*blocks)
    if mesh is not None:
        shard(model, mesh)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
