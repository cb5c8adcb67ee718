"""Each stage of a pipeline clips its gradients by their own norm."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, over_ranks, valid
from museum.pipeline import Stage, run

ABOUT = {
    "number": 51,
    "title": "Each stage clips by its own norm",
    "sources": ["pytorch/torchtitan#596", "pytorch/torchtitan#649", "Modalities/modalities#313"],
    "symptom": "The gradient norm is that of one stage's parameters; stages are scaled differently.",
    "axis": "pp",
    "mesh": "pp=2",
    "kind": "step",
    "wrong": "gradient norm",
    "reason": "norm of a part",
    "before": "clip_grad_norm_ on what a rank has",
    "after": "squares are summed over the stages first",
}
MOST_NORM = 0.1


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
    loss = run(model, ids_BS, labels_BS, 2, valid(labels_BS), mesh)
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    squares = torch.stack([each.square().sum() for each in gradients]).sum()
    if not fault:
        squares = over_ranks(squares, mesh, "pp")
    for gradient in gradients:
        gradient.mul_((MOST_NORM / squares.sqrt()).clamp(max=1.0))
    optimizer.step()
    return loss


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
