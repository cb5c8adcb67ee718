"""A gated norm of each head's output, as linear attention has one: shared by all heads, which are cut."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import (
    HEAD,
    HEADS,
    WIDTH,
    Attention,
    Column,
    Small,
    attended,
    heads_of,
    shard,
    sums_in_backward,
)

ABOUT = {
    "number": 6,
    "title": "The output norm of linear attention is summed only where sequence parallelism is on",
    "sources": ["NVIDIA/Megatron-LM#7452"],
    "symptom": "Without sequence parallelism the shared norm's gradient is a part on each rank; the loss is "
    "exact.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.out_norm.weight",
    "reason": "parts not summed",
    "before": "the step all-reduces it under sequence parallelism alone",
    "after": "it is all-reduced over tp in either case",
}


class Gated(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Column(WIDTH, HEADS * HEAD, bias=False)
        self.out_norm = nn.RMSNorm(HEAD)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        q_BNSH, k_BNSH, v_BNSH = (heads_of(layer(x_BSD)) for layer in (self.q, self.k, self.v))
        out_BSNH = attended(q_BNSH, k_BNSH, v_BNSH).unflatten(-1, (-1, HEAD))
        gate_BSNH = self.gate(x_BSD).unflatten(-1, (-1, HEAD))
        out: Tensor = self.o((self.out_norm(out_BSNH) * torch.sigmoid(gate_BSNH)).flatten(2))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Gated()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        if not fault:
            sums_in_backward(block.out_norm.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
