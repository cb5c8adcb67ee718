"""The bias of a row-parallel layer is divided by the ranks before the sum: the forward is right, and the bias
learns at a fraction of its rate."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Leave, Mlp, Row, Small, local, shard

ABOUT = {
    "number": 2,
    "title": "A row-parallel bias is divided in the forward, and so is its gradient",
    "sources": ["pytorch/torchtitan#4332"],
    "symptom": "Outputs and loss are exact; the bias' gradient is 1/ranks of what it should be.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.down.bias",
    "reason": "averaged",
    "before": "every rank adds bias / ranks to its partial product",
    "after": "the bias is added to the sum, once",
}


class Divided(Row):
    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(x)
        part = F.linear(x, local(self.weight), self.bias / self.group.size())
        out: Tensor = Leave.apply(part, self.group)
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mlp(bias=True)
    if fault:
        block.down = Divided(INNER, WIDTH)
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
