"""Gradient accumulation averages the micro-batches' means, whose numbers of labels are unequal."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, over_ranks, sum_gradients, valid

ABOUT = {
    "number": 29,
    "title": "Gradient accumulation averages means over unequal micro-batches",
    "sources": [
        "meta-pytorch/torchtune#1875",
        "ml-explore/mlx-lm#1413",
        "karpathy/nanochat#59",
        "huggingface/blog#2414",
    ],
    "symptom": "Losses with and without gradient accumulation don't match, though the batch is the same.",
    "axis": "accumulation",
    "mesh": "dp=2",
    "kind": "step",
    "wrong": "loss",
    "reason": "loss of a part",
    "before": "each micro-batch divides by its own labels, and by the number of micro-batches",
    "after": "each divides by the labels that count in the global batch",
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
    reported, n_micro = torch.zeros(()), 2
    of_micro_batch = mesh is not None and fault
    for ids, labels in zip(ids_BS.chunk(n_micro), labels_BS.chunk(n_micro), strict=True):
        n_valid = over_ranks(valid(labels if of_micro_batch else labels_BS), mesh, "dp")
        loss = loss_sum(model(ids), labels) / (n_valid * n_micro if of_micro_batch else n_valid)
        loss.backward()
        reported = reported + over_ranks(loss, mesh, "dp")
    if mesh is not None:
        sum_gradients(model.parameters(), mesh.get_group("dp"))
    optimizer.step()
    return reported


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
