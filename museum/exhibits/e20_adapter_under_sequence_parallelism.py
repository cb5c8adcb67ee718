"""A low-rank adapter on a row-parallel layer: its second factor is whole on every rank and sees that rank's
part of the sequence."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Column, Give, Row, Small, Take, shard, sums_in_backward

ABOUT = {
    "number": 20,
    "title": "The replicated factor of an adapter trains on its own rank's tokens",
    "sources": ["modelscope/mcore-bridge#173", "OpenPipe/ART#619"],
    "symptom": "Each tensor-parallel rank trains another copy of the factor, and one of them is exported.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.b.weight",
    "reason": "parts not summed",
    "before": "the factor isn't marked as one whose gradient is summed",
    "after": "its gradient is all-reduced over tp",
}
RANK = 4


class Adapted(nn.Module):
    """up, then down with factors a (cut as down is) and b (whole). Frozen: up and down."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Column(WIDTH, INNER, bias=False), Row(INNER, WIDTH, bias=False)
        self.a, self.b = Row(INNER, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        inner_BSF = torch.tanh(self.up(x_BSD))
        squeezed_BSR = self.a(inner_BSF)
        if self.mesh is None:
            added_BSD = self.b(squeezed_BSR)
        else:
            group = self.mesh.get_group("tp")
            added_BSD = Give.apply(self.b(Take.apply(squeezed_BSR, 1, group)), 1, group, False)
        out: Tensor = self.down(inner_BSF) + added_BSD
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Adapted()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        block.mesh = mesh
    for layer in (block.up, block.down):
        layer.weight.requires_grad_(False)
    if mesh is not None and not fault:
        sums_in_backward(block.b.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
