"""Each rank takes the mean over its own labels, and ranks are averaged: labels of a rank with few count
more."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, over_ranks, sum_gradients, valid

ABOUT = {
    "number": 28,
    "title": "The mean over ranks of means over unequal numbers of labels",
    "sources": [
        "pytorch/torchtitan#1842",
        "pytorch/torchtitan#2206",
        "huggingface/transformers#34242",
        "PrimeIntellect-ai/prime-rl#1957",
    ],
    "symptom": "With padding or packed samples the gradient depends on which rank a token lands on.",
    "axis": "dp",
    "mesh": "dp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "loss of a part",
    "before": "each rank divides by the labels that count on it, and gradients are averaged",
    "after": "all divide by the labels that count in the global batch, and gradients are summed",
}


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    return Small(Mlp())


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
    total, n_valid = loss_sum(model(ids_BS), labels_BS), valid(labels_BS)
    averages = mesh is not None and fault
    loss = total / (n_valid if averages else over_ranks(n_valid, mesh, "dp"))
    loss.backward()
    reported = over_ranks(loss, mesh, "dp")
    if mesh is not None:
        group = mesh.get_group("dp")
        sum_gradients(model.parameters(), group, group.size() if averages else 1.0)
        reported = reported / group.size() if averages else reported
    optimizer.step()
    return reported


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
