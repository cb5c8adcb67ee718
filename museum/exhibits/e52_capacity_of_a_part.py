"""Experts take so many tokens and drop the rest; each rank counts its own tokens, and drops others than one
process does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import INNER, WIDTH, Give, Mlp, Small, Take, gathered, shard, sums_in_backward

ABOUT = {
    "number": 52,
    "title": "An expert's capacity is counted in each rank's own tokens",
    "sources": ["microsoft/Tutel#173", "deepspeedai/DeepSpeed#6809"],
    "symptom": "Ranks come to other capacities from their own tokens: a hang where numbers differ, and other "
    "tokens dropped than with one rank where they don't.",
    "axis": "ep",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0",
    "reason": "output of a module",
    "before": "each rank counts, for each expert, the tokens that it has",
    "after": "counts go on from those of the ranks before, and the capacity is that of all tokens",
}
EXPERTS = 4


class Mixture(nn.Module):
    """The best of 4 experts for each token, as long as the expert takes any. Ranks have a part of the
    sequence each, and all experts."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 5)
        self.counts_all = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.mesh is None:
            return self._computed(x_BSD)
        group = self.mesh.get_group("tp")
        out: Tensor = Give.apply(self._computed(Take.apply(x_BSD, 1, group)), 1, group, False)
        return out

    def _computed(self, x_BSD: Tensor) -> Tensor:
        scores_BSE = self.router(x_BSD).softmax(-1)
        chosen_BSE = F.one_hot(scores_BSE.argmax(-1), EXPERTS)
        in_order_TE = chosen_BSE.transpose(0, 1).flatten(0, 1)
        before_TE, n_tokens = in_order_TE.cumsum(0) - in_order_TE, len(in_order_TE)
        if self.mesh is not None and self.counts_all:
            group = self.mesh.get_group("tp")
            counts_RE = gathered(in_order_TE.sum(0, keepdim=True), 0, group)
            before_TE, n_tokens = before_TE + counts_RE[: group.rank()].sum(0), n_tokens * group.size()
        is_taken_TE = in_order_TE * (before_TE < n_tokens // EXPERTS)
        is_taken_BSE = is_taken_TE.unflatten(0, (x_BSD.shape[1], -1)).transpose(0, 1)
        hidden_BSEF = torch.einsum("bsd,edf->bsef", x_BSD, self.into).relu()
        return torch.einsum("bsef,efd,bse->bsd", hidden_BSEF, self.back, scores_BSE * is_taken_BSE)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mixture()
    model = Small(block, Mlp())
    if mesh is not None:
        shard(model, mesh)
        block.mesh, block.counts_all = mesh, not fault
        for parameter in block.parameters():
            sums_in_backward(parameter, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
