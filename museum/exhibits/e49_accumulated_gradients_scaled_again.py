"""The schedule scales all gradients after each call: those of an earlier call are scaled again with each
later one."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, valid
from museum.pipeline import Stage, run

ABOUT = {
    "number": 49,
    "title": "Accumulated gradients are scaled again by each run of the schedule",
    "sources": ["pytorch/torchtitan#1732", "pytorch/torchtitan#1733"],
    "symptom": "The accumulated gradient is a moving average instead of a sum; loss curves diverge.",
    "axis": "pp",
    "mesh": "pp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "scaled again",
    "before": "after each run of the schedule every gradient is divided by its micro-batches",
    "after": "the loss is divided, and gradients are left alone",
}
N_MICRO = 2


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
    n_valid = valid(labels_BS)
    scales = mesh is not None and fault
    loss = torch.zeros(())
    for ids, labels in zip(ids_BS.chunk(2), labels_BS.chunk(2), strict=True):
        loss = loss + run(model, ids, labels, N_MICRO, n_valid / N_MICRO if scales else n_valid, mesh) / (
            N_MICRO if scales else 1
        )
        if scales:
            for each in model.parameters():
                if each.grad is not None:
                    each.grad.div_(N_MICRO)
    optimizer.step()
    return loss


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
