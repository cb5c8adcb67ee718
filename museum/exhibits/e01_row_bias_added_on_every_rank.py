"""The bias of a row-parallel layer is added before the sum, so as often as there are ranks."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Leave, Mlp, Row, Small, local, shard

ABOUT = {
    "number": 1,
    "title": "A row-parallel bias is added once on every rank",
    "sources": ["huggingface/text-generation-inference#1036", "Wenyueh/MinivLLM#80", "awslabs/slapo#10"],
    "symptom": "Outputs are off by (ranks - 1) times the bias; nothing raises.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.down",
    "reason": "added on every rank",
    "before": "each rank gives its bias to the partial product, and the all-reduce sums all of them",
    "after": "the bias is added to the sum",
}


class BiasFirst(Row):
    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(x)
        out: Tensor = Leave.apply(F.linear(x, local(self.weight), self.bias), self.group)
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mlp(bias=True)
    if fault:
        block.down = BiasFirst(INNER, WIDTH)
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
