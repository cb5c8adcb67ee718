"""Gradients are clipped by the norm of this rank's shards, on each rank by another one."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from museum.parts import Mlp, Small, local, loss_sum, over_ranks, valid

ABOUT = {
    "number": 32,
    "title": "FSDP: each rank clips by the norm of its own shards",
    "sources": [
        "pytorch/pytorch#170862",
        "areal-project/AReaL#312",
        "sgl-project/SpecForge#663",
        "pytorch/torchtitan#766",
    ],
    "symptom": "The gradient norm differs between ranks; the threshold grows with their number, and the "
    "clipped "
    "gradient points elsewhere.",
    "axis": "fsdp",
    "mesh": "fsdp=2",
    "kind": "step",
    "wrong": "gradient norm",
    "reason": "norm of a part",
    "before": "the norm is that of the local shards",
    "after": "squares are summed over the ranks first",
}
MOST_NORM = 0.1


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp())
    if mesh is not None:
        sharded = fully_shard(model, mesh=mesh["fsdp"])
        sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the global batch already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no factor
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
    loss = loss_sum(model(ids_BS), labels_BS) / over_ranks(valid(labels_BS), mesh, "fsdp")
    loss.backward()
    gradients = [local(each.grad) for each in model.parameters() if each.grad is not None]
    squares = torch.stack([each.square().sum() for each in gradients]).sum()
    if not fault:
        squares = over_ranks(squares, mesh, "fsdp")
    for gradient in gradients:
        gradient.mul_((MOST_NORM / squares.sqrt()).clamp(max=1.0))
    optimizer.step()
    return over_ranks(loss, mesh, "fsdp")


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
