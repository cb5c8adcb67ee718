"""Local means are averaged over the ranks for all parameters but experts, whose gradients are sums over all
ranks' tokens already."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from museum.parts import INNER, WIDTH, Exchange, Small, cut, local, loss_sum, over_ranks, sum_gradients

ABOUT = {
    "number": 38,
    "title": "Expert gradients are as many times too large as there are ranks of experts",
    "sources": [
        "NVIDIA/Megatron-LM#5956",
        "deepspeedai/DeepSpeed#6546",
        "deepspeedai/DeepSpeed#5259",
        "databricks/megablocks#20",
        "pytorch/pytorch#160285",
    ],
    "symptom": "Gradients are exactly doubled at two ranks of experts; loss curves are equivalent.",
    "axis": "ep",
    "mesh": "ep=2",
    "kind": "step",
    "wrong": "blocks.0.into",
    "reason": "summed too often",
    "before": "experts are reduced over the ranks that hold the same ones, which is one",
    "after": "experts' gradients are divided by the ranks whose tokens came",
}
EXPERTS = 4


class Mixture(nn.Module):
    """Every expert computes all tokens; ranks along ep hold some experts each, and have other tokens, which
    travel to all experts."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        weights_BSE1 = self.router(x_BSD).softmax(-1).unsqueeze(-1)
        if self.mesh is None:
            given_BSED = experts(x_BSD, self.into, self.back)
        else:
            group = self.mesh.get_group("ep")
            sent = Exchange.apply(torch.stack([x_BSD] * group.size()), group)
            computed = experts(sent, local(self.into), local(self.back))
            given_BSED = torch.cat(list(Exchange.apply(computed, group)), -2)
        out: Tensor = (weights_BSE1 * given_BSED).sum(-2)
        return out


def experts(x: Tensor, into_EDF: Tensor, back_EFD: Tensor) -> Tensor:
    """[..., D] -> [..., E, D]"""
    return torch.einsum("...ef,efd->...ed", torch.einsum("...d,edf->...ef", x, into_EDF).relu(), back_EFD)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Mixture()
    model = Small(block)
    if mesh is not None:
        cut(block, "into", mesh["ep"], 0)
        cut(block, "back", mesh["ep"], 0)
        block.mesh = mesh
    return model


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
    # every token counts here, so that the mean of the ranks' means is the mean
    labels_BS = labels_BS.clamp(min=0)
    loss = loss_sum(model(ids_BS), labels_BS) / labels_BS.numel()
    loss.backward()
    reported = over_ranks(loss, mesh, "ep")
    if mesh is not None:
        group = mesh.get_group("ep")
        dense = [each for each in model.parameters() if not isinstance(each, DTensor)]
        sum_gradients(dense, group, group.size())
        if not fault:
            for each in model.parameters():
                if isinstance(each, DTensor) and each.grad is not None:
                    local(each.grad).div_(group.size())
        reported = reported / group.size()
    optimizer.step()
    return reported


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
