"""Stages are set up anew between two runs of the schedule, which drops the gradients so far."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, valid
from museum.pipeline import Stage, run

ABOUT = {
    "number": 50,
    "title": "Setting up stages anew drops what was accumulated",
    "sources": ["NVIDIA-NeMo/Automodel#3530"],
    "symptom": "Only the last part of the batch trains the model; the loss, summed apart, looks fine.",
    "axis": "pp",
    "mesh": "pp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "dropped in part",
    "before": "setting up a stage clears its gradients, also in the middle of a step",
    "after": "gradients are kept",
}


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp(), Mlp())
    return model if mesh is None else Stage(model, mesh)


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
    loss = torch.zeros(())
    for ids, labels in zip(ids_BS.chunk(2), labels_BS.chunk(2), strict=True):
        if mesh is not None and fault:
            model.zero_grad()
        loss = loss + run(model, ids, labels, 1, valid(labels_BS), mesh)
    optimizer.step()
    return loss


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
