"""Experts run on local tensors inside local_map, and what their inputs' gradients are isn't said: taken for
whole, they are parts."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from museum.parts import INNER, WIDTH, Mlp, Small, cut, shard

ABOUT = {
    "number": 11,
    "title": "Experts in local_map: gradients of everything below them lose their reduction",
    "sources": ["pytorch/torchtitan#4054", "pytorch/torchtitan#1805", "pytorch/torchtitan#1878"],
    "symptom": "Router gradients off by 1.7 to 2.7 times at four ranks, everything below the experts "
    "under-reduced; loss curves look normal.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.1.router.weight",
    "reason": "parts not summed",
    "before": "local_map takes the placements of the inputs for those of their gradients",
    "after": "in_grad_placements says Partial for the tokens and the weights of the experts",
}
EXPERTS = 4


class Mixture(nn.Module):
    """Every expert computes all tokens, weighted by a softmax router; experts are cut along their inner "
    "width."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 5)
        self.says_parts = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        weights_BSE = self.router(x_BSD).softmax(-1)
        if self.mesh is None:
            return experts(x_BSD, weights_BSE, self.into, self.back)
        whole, tp = [Replicate()], self.mesh["tp"]
        parts = ([Partial()], [Partial()], [Shard(2)], [Shard(1)]) if self.says_parts else None
        run = local_map(
            experts,
            out_placements=[Partial()],
            in_placements=(whole, whole, [Shard(2)], [Shard(1)]),
            in_grad_placements=parts,
            device_mesh=tp,
        )
        given = (DTensor.from_local(each, tp, whole, run_check=False) for each in (x_BSD, weights_BSE))
        out: DTensor = run(*given, self.into, self.back)
        return out.redistribute(placements=whole).to_local()


def experts(x_BSD: Tensor, weights_BSE: Tensor, into_EDF: Tensor, back_EFD: Tensor) -> Tensor:
    hidden_BSEF = torch.einsum("bsd,edf->bsef", x_BSD, into_EDF).relu()
    return torch.einsum("bsef,efd,bse->bsd", hidden_BSEF, back_EFD, weights_BSE)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mixture()
    model = Small(Mlp(), block)
    if mesh is not None:
        shard(model, mesh)
        cut(block, "into", mesh["tp"], 2)
        cut(block, "back", mesh["tp"], 1)
        block.mesh, block.says_parts = mesh, not fault
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
