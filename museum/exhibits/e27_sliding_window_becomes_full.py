"""Sharing sequences replaces a layer's mask by "causal", whatever the mask was."""

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
    "number": 27,
    "title": "A sliding window becomes full causal attention under context parallelism",
    "sources": ["huggingface/accelerate#4177"],
    "symptom": "Training runs, the loss looks plausible, and the model learns with another attention "
    "pattern.",
    "axis": "cp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0",
    "reason": "output of a module",
    "before": "a hook drops the mask and says is_causal",
    "after": "each rank's queries keep their rows of the mask",
}
WINDOW = 4


class Shared(nn.Module):
    """Causal attention of which each rank computes its part of the sequence's queries, with keys and values
    gathered from all."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.keeps_window = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        length = x_BSD.shape[1]
        causal_ST = torch.ones(length, length, dtype=torch.bool).tril()
        mask_ST = causal_ST.triu(1 - WINDOW)
        if self.mesh is not None:
            group = self.mesh.get_group("tp")
            x_BSD = Take.apply(x_BSD, 1, group)
            mask_ST = (mask_ST if self.keeps_window else causal_ST).chunk(group.size())[group.rank()]
        q_BNSH, k_BNSH, v_BNSH = (heads_of(layer(x_BSD)) for layer in (self.q, self.k, self.v))
        if self.mesh is not None:
            k_BNSH, v_BNSH = (Give.apply(each, 2, group, True) for each in (k_BNSH, v_BNSH))
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH, mask_ST))
        return out if self.mesh is None else Give.apply(out, 1, group, False)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Shared()
    model = Small(block, Mlp())
    if mesh is not None:
        shard(model, mesh)
        block.mesh, block.keeps_window = mesh, not fault
        for layer in (block.q, block.k, block.v, block.o):
            sums_in_backward(layer.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
