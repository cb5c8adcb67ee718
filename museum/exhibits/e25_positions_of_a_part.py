"""Ranks share each sequence, and each numbers the tokens of its part from 0."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import (
    HEAD,
    HEADS,
    WIDTH,
    Give,
    Mlp,
    Small,
    Take,
    attended,
    heads_of,
    shard,
    sums_in_backward,
)

ABOUT = {
    "number": 25,
    "title": "Rotary positions count from 0 on every rank that shares a sequence",
    "sources": ["vllm-project/speculators#871", "sgl-project/sglang#28463", "NVIDIA/Megatron-LM#1612"],
    "symptom": "Attention under context parallelism turns queries and keys by the wrong angle; nothing "
    "raises.",
    "axis": "cp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0",
    "reason": "output of a module",
    "before": "positions are arange(length of this rank's part)",
    "after": "positions begin where this rank's part does",
}


class Shared(nn.Module):
    """Causal attention of which each rank computes its part of the sequence's queries, with keys and values
    gathered from all."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.counts_on = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        first, length = 0, x_BSD.shape[1]
        if self.mesh is not None:
            group = self.mesh.get_group("tp")
            x_BSD = Take.apply(x_BSD, 1, group)
            first = group.rank() * x_BSD.shape[1]
        positions = torch.arange(x_BSD.shape[1]) + (first if self.counts_on else 0)
        q_BNSH, k_BNSH = (turned(heads_of(layer(x_BSD)), positions) for layer in (self.q, self.k))
        v_BNSH = heads_of(self.v(x_BSD))
        if self.mesh is not None:
            k_BNSH, v_BNSH = (Give.apply(each, 2, group, True) for each in (k_BNSH, v_BNSH))
        mask_ST = torch.ones(length, length, dtype=torch.bool).tril()[first : first + x_BSD.shape[1]]
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH, mask_ST))
        return out if self.mesh is None else Give.apply(out, 1, group, False)


def turned(x_BNSH: Tensor, positions_S: Tensor) -> Tensor:
    """Rotary embedding; head dims go together in halves."""
    speeds_H = 10.0 ** -torch.arange(x_BNSH.shape[-1] // 2)
    angles_SH = positions_S.unsqueeze(-1) * speeds_H
    a, b = x_BNSH.chunk(2, -1)
    return torch.cat(
        [a * angles_SH.cos() - b * angles_SH.sin(), b * angles_SH.cos() + a * angles_SH.sin()], -1
    )


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Shared()
    model = Small(block, Mlp())
    if mesh is not None:
        shard(model, mesh)
        block.mesh, block.counts_on = mesh, not fault
        for layer in (block.q, block.k, block.v, block.o):
            sums_in_backward(layer.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
