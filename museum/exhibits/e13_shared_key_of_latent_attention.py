"""Latent attention: one projection gives a latent, which each rank unfolds into its heads, and a key part
that all heads share. Of the second nobody sums what the ranks' heads give back."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, WIDTH, Column, Enter, Row, Small, attended, heads_of, shard

ABOUT = {
    "number": 13,
    "title": "The shared key of latent attention: some rows of one weight are parts",
    "sources": ["pytorch/torchtitan#1373"],
    "symptom": "The forward is exact, and training under tensor parallelism diverges after a thousand steps.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.squeeze.weight",
    "reason": "parts not summed",
    "before": "the shared part of the key is expanded to this rank's heads as it is",
    "after": "its gradient is all-reduced over the ranks, as the latent's is",
}
LATENT, SHARED = 8, 4


class Latent(nn.Module):
    group: ProcessGroup | None = None

    def __init__(self) -> None:
        super().__init__()
        self.query = Column(WIDTH, HEADS * (HEAD + SHARED), bias=False)
        self.squeeze = nn.Linear(WIDTH, LATENT + SHARED, bias=False)
        self.unfold = Column(LATENT, HEADS * 2 * HEAD, bias=False)
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BNSH = heads_of(self.query(x_BSD), HEAD + SHARED)
        latent_BSL, shared_BSH = self.squeeze(x_BSD).split([LATENT, SHARED], -1)
        if self.group is not None:
            shared_BSH = Enter.apply(shared_BSH, self.group)
        k_BNSH, v_BNSH = heads_of(self.unfold(latent_BSL), 2 * HEAD).split(HEAD, -1)
        shared_BNSH = shared_BSH.unsqueeze(1).expand(-1, k_BNSH.shape[1], -1, -1)
        out: Tensor = self.o(attended(q_BNSH, torch.cat([k_BNSH, shared_BNSH], -1), v_BNSH))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Latent()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        if not fault:
            block.group = mesh.get_group("tp")
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
