"""Tensor-parallel ranks have the same tokens, and each sends its copy to the experts: they learn from each
token as often as there are ranks."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Exchange, Give, Small, Take, cut, local, sums_in_backward

ABOUT = {
    "number": 24,
    "title": "Copies of a token reach the experts from every tensor-parallel rank",
    "sources": ["deepspeedai/Megatron-DeepSpeed#63", "deepspeedai/DeepSpeed#2074"],
    "symptom": "Outputs are right, experts do the work of each token several times, and convergence suffers.",
    "axis": "ep",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.into",
    "reason": "summed too often",
    "before": "each rank sends all its tokens to the ranks that hold experts",
    "after": "each rank sends its part of the tokens, and the results are gathered",
}
EXPERTS = 4


class Mixture(nn.Module):
    """Every expert computes all tokens, weighted by a softmax router; each rank holds some experts."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 5)
        self.drops_copies = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.mesh is None:
            return weighted(self.router(x_BSD), experts(x_BSD, self.into, self.back))
        group = self.mesh.get_group("tp")
        if self.drops_copies:
            x_BSD = Take.apply(x_BSD, 1, group)
        sent = torch.stack([x_BSD] * group.size())
        computed = experts(Exchange.apply(sent, group), local(self.into), local(self.back))
        given_BSED = torch.cat(list(Exchange.apply(computed, group)), -2)
        out: Tensor = weighted(self.router(x_BSD), given_BSED)
        return Give.apply(out, 1, group, False) if self.drops_copies else out


def experts(x: Tensor, into_EDF: Tensor, back_EFD: Tensor) -> Tensor:
    """[..., D] -> [..., E, D]"""
    return torch.einsum("...ef,efd->...ed", torch.einsum("...d,edf->...ef", x, into_EDF).relu(), back_EFD)


def weighted(logits_BSE: Tensor, given_BSED: Tensor) -> Tensor:
    return (logits_BSE.softmax(-1).unsqueeze(-1) * given_BSED).sum(-2)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mixture()
    model = Small(block)
    if mesh is not None:
        cut(block, "into", mesh["tp"], 0)
        cut(block, "back", mesh["tp"], 0)
        block.mesh, block.drops_copies = mesh, not fault
        if not fault:
            sums_in_backward(block.router.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
