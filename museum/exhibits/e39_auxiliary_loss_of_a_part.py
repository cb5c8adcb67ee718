"""A mixture's balancing loss multiplies two means over tokens: the mean over the ranks of such products
isn't the product over all tokens."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import INNER, WIDTH, Small, loss_sum, over_ranks, sum_gradients, valid

ABOUT = {
    "number": 39,
    "title": "A balancing loss is taken over each rank's tokens",
    "sources": ["databricks/megablocks#85", "pytorch/torchtitan#3000", "NVIDIA/Megatron-LM#3768"],
    "symptom": "The balancing loss, and the router's gradient, change with the number of ranks.",
    "axis": "ep",
    "mesh": "dp=2",
    "kind": "step",
    "wrong": "loss",
    "reason": "loss of a part",
    "before": "shares of tokens are counted on each rank, and losses are averaged",
    "after": "shares are averaged over the ranks before the product",
}
EXPERTS = 4


class Routed(nn.Module):
    """The best of 4 experts for each token, its output weighted by its score. scores: of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 5)
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x_BSD: Tensor) -> Tensor:
        self.scores_BSE = self.router(x_BSD).softmax(-1)
        chosen_BS1 = (self.scores_BSE + self.bias).argmax(-1, keepdim=True)
        self.is_chosen_BSE = torch.zeros_like(self.scores_BSE).scatter(-1, chosen_BS1, 1.0)
        hidden_BSEF = torch.einsum("bsd,edf->bsef", x_BSD, self.into).relu()
        weights_BSE = self.scores_BSE * self.is_chosen_BSE
        return torch.einsum("bsef,efd,bse->bsd", hidden_BSEF, self.back, weights_BSE)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    return Small(Routed())


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)


def step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: tuple[Tensor, Tensor],
    mesh: DeviceMesh | None = None,
    fault: bool = True,
) -> Tensor:
    """One training step on this rank's part of a batch, ids and labels [B, S]; the loss that is reported."""
    ids_BS, labels_BS = batch
    optimizer.zero_grad()
    block = cast(Routed, model.blocks[0])  # type: ignore[index]
    loss = loss_sum(model(ids_BS), labels_BS) / over_ranks(valid(labels_BS), mesh, "dp")
    ranks = 1 if mesh is None else mesh["dp"].size()
    shares_E = block.is_chosen_BSE.mean((0, 1))
    if not fault:
        shares_E = over_ranks(shares_E, mesh, "dp") / ranks
    loss = loss + EXPERTS * (shares_E * block.scores_BSE.mean((0, 1))).sum() / ranks
    loss.backward()
    if mesh is not None:
        sum_gradients(model.parameters(), mesh.get_group("dp"))
    optimizer.step()
    return over_ranks(loss, mesh, "dp")


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
