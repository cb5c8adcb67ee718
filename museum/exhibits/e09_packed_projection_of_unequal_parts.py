"""One projection gives queries, keys, values and a gate per head, of unequal widths, and is cut evenly."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, WIDTH, Column, Row, Small, attended, heads_of, shard

ABOUT = {
    "number": 9,
    "title": "A packed projection of unequal parts is cut evenly",
    "sources": ["NVIDIA/Megatron-LM#1989", "vllm-project/vllm#36242"],
    "symptom": "One rank holds all queries, all keys and some values, the other the rest; fine with one "
    "rank.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.pack.weight",
    "reason": "cut as one",
    "before": "rows are [q | k | v | gates] of 8, 8, 16 and 4, and rank r has the r-th half of them",
    "after": "rows come head by head, so that a half is whole heads with all that belongs to them",
}
NARROW = 2
SIZES = (NARROW, NARROW, HEAD, 1)


class Packed(nn.Module):
    """by_head: how the rows of pack are ordered."""

    def __init__(self, by_head: bool) -> None:
        super().__init__()
        self.pack = Column(WIDTH, HEADS * sum(SIZES), bias=False)
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)
        self.by_head = by_head

    def forward(self, x_BSD: Tensor) -> Tensor:
        packed_BSF = self.pack(x_BSD)
        if self.by_head:
            q_BNSH, k_BNSH, v_BNSH, gate_BNS1 = heads_of(packed_BSF, sum(SIZES)).split(SIZES, -1)
        else:
            heads = packed_BSF.shape[-1] // sum(SIZES)
            parts = packed_BSF.split([heads * size for size in SIZES], -1)
            q_BNSH, k_BNSH, v_BNSH, gate_BNS1 = (
                heads_of(part, size) for part, size in zip(parts, SIZES, strict=True)
            )
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH * torch.sigmoid(gate_BNS1)))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Packed(by_head=not fault))
    if mesh is not None:
        shard(model, mesh)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
