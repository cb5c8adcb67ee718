"""Each rank holds some experts and computes all tokens with them; scores of other ranks' experts are zeroed,
so that a rank's gradient of the scores is that of its experts."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Enter, Leave, Small, cut, local

ABOUT = {
    "number": 23,
    "title": "Expert parallelism: a router's gradient is that of a rank's own experts",
    "sources": ["huggingface/transformers#48205", "huggingface/transformers#48687"],
    "symptom": "The loss is correct, and everything above each mixture lacks the other ranks' experts.",
    "axis": "ep",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.router.weight",
    "reason": "parts not summed",
    "before": "scores of experts elsewhere are masked, and the rest's gradient is taken for whole",
    "after": "gradients of scores and tokens are all-reduced on their way out of the mixture",
}
EXPERTS, CHOSEN = 4, 2


class Mixture(nn.Module):
    """Top 2 of 4 experts."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 5)
        self.scores_enter = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        scores_BSE = self.router(x_BSD).softmax(-1)
        is_chosen_BSE = torch.zeros_like(scores_BSE).scatter(-1, scores_BSE.topk(CHOSEN).indices, 1.0)
        weights_BSE = scores_BSE * is_chosen_BSE
        if self.mesh is None:
            return experts(x_BSD, weights_BSE, self.into, self.back)
        group = self.mesh.get_group("tp")
        if self.scores_enter:
            weights_BSE = Enter.apply(weights_BSE, group)
        own_BSE = weights_BSE.chunk(group.size(), -1)[group.rank()]
        part = experts(Enter.apply(x_BSD, group), own_BSE, local(self.into), local(self.back))
        out: Tensor = Leave.apply(part, group)
        return out


def experts(x_BSD: Tensor, weights_BSE: Tensor, into_EDF: Tensor, back_EFD: Tensor) -> Tensor:
    hidden_BSEF = torch.einsum("bsd,edf->bsef", x_BSD, into_EDF).relu()
    return torch.einsum("bsef,efd,bse->bsd", hidden_BSEF, back_EFD, weights_BSE)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mixture()
    model = Small(block)
    if mesh is not None:
        cut(block, "into", mesh["tp"], 0)
        cut(block, "back", mesh["tp"], 0)
        block.mesh, block.scores_enter = mesh, not fault
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
