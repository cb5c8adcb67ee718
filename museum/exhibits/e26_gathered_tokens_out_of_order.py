"""Ranks share each sequence in head-tail pairs of chunks, and gathered keys are taken for the sequence as
the ranks come."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import (
    HEAD,
    HEADS,
    WIDTH,
    Give,
    Mlp,
    Small,
    attended,
    gathered,
    heads_of,
    shard,
    sums_in_backward,
)

ABOUT = {
    "number": 26,
    "title": "Tokens of a shared sequence are gathered out of their order",
    "sources": ["THUDM/slime#1871", "NVIDIA/Model-Optimizer#1804"],
    "symptom": "Silently scrambled token order in attention under context parallelism.",
    "axis": "cp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0",
    "reason": "output of a module",
    "before": "keys stand in the order of the ranks' chunks: 0, 3, 1, 2",
    "after": "keys are put in the order of the sequence",
}


class Shared(nn.Module):
    """Causal attention of which each rank computes its part of the sequence's queries, with keys and values
    gathered from all."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.puts_in_order = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        length = x_BSD.shape[1]
        mask_ST = torch.ones(length, length, dtype=torch.bool).tril()
        if self.mesh is not None:
            group = self.mesh.get_group("tp")
            order = dealt(length, group.size())
            own = order.chunk(group.size())[group.rank()]
            x_BSD, mask_ST = Chosen.apply(x_BSD, own, order, group), mask_ST[own]
        q_BNSH, k_BNSH, v_BNSH = (heads_of(layer(x_BSD)) for layer in (self.q, self.k, self.v))
        if self.mesh is not None:
            k_BNSH, v_BNSH = (Give.apply(each, 2, group, True) for each in (k_BNSH, v_BNSH))
            if self.puts_in_order:
                k_BNSH, v_BNSH = (each[:, :, order.argsort()] for each in (k_BNSH, v_BNSH))
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH, mask_ST))
        return out if self.mesh is None else Give.apply(out, 1, group, False)[:, order.argsort()]


def dealt(length: int, ranks: int) -> Tensor:
    """Tokens, rank by rank: of 2 x ranks chunks rank r has chunks r and 2 x ranks - 1 - r."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(ranks)])


class Chosen(torch.autograd.Function):
    """This rank's tokens of what all have; gradients of all make the whole's."""

    @staticmethod
    def forward(ctx, x_BSD: Tensor, own: Tensor, order: Tensor, group: ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.order, ctx.group = order, group
        return x_BSD[:, own]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        return gathered(gradient, 1, ctx.group)[:, ctx.order.argsort()], None, None, None


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Shared()
    model = Small(block, Mlp())
    if mesh is not None:
        shard(model, mesh)
        block.mesh, block.puts_in_order = mesh, not fault
        for layer in (block.q, block.k, block.v, block.o):
            sums_in_backward(layer.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
