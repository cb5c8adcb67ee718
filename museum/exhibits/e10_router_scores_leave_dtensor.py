"""A router's scores go to experts that are cut over the ranks, and their gradient comes back as a part."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Enter, Leave, Small, cut, local

ABOUT = {
    "number": 10,
    "title": "A router under tensor parallelism: its gradient isn't reduced",
    "sources": ["pytorch/torchtitan#2387", "pytorch/torchtitan#2388", "pytorch/torchtitan#2416"],
    "symptom": "Router weights differ between tensor-parallel ranks right after the first step.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.router.weight",
    "reason": "parts not summed",
    "before": "scores become local tensors without saying that their gradient is a part",
    "after": "the gradient of the scores is all-reduced on its way back to the router",
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
        self.scores_enter = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        weights_BSE = self.router(x_BSD).softmax(-1)
        if self.mesh is None:
            return experts(x_BSD, weights_BSE, self.into, self.back)
        group = self.mesh.get_group("tp")
        if self.scores_enter:
            weights_BSE = Enter.apply(weights_BSE, group)
        part = experts(Enter.apply(x_BSD, group), weights_BSE, local(self.into), local(self.back))
        out: Tensor = Leave.apply(part, group)
        return out


def experts(x_BSD: Tensor, weights_BSE: Tensor, into_EDF: Tensor, back_EFD: Tensor) -> Tensor:
    hidden_BSEF = torch.einsum("bsd,edf->bsef", x_BSD, into_EDF).relu()
    return torch.einsum("bsef,efd,bse->bsd", hidden_BSEF, back_EFD, weights_BSE)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mixture()
    model = Small(block)
    if mesh is not None:
        cut(block, "into", mesh["tp"], 2)
        cut(block, "back", mesh["tp"], 1)
        block.mesh, block.scores_enter = mesh, not fault
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
