"""Dropout of what tensor-parallel ranks hold alike draws another mask on each of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, shard, valid

ABOUT = {
    "number": 45,
    "title": "Dropout masks of replicated activations differ between tensor-parallel ranks",
    "sources": ["pytorch/pytorch#146190", "awslabs/slapo#21", "OpenPipe/ART#918"],
    "symptom": "Ranks go on with other activations, and what they hold alike drifts apart.",
    "axis": "rng",
    "mesh": "tp=2",
    "kind": "step",
    "wrong": "dropout",
    "reason": "ranks drift",
    "before": "each rank seeds with its own number",
    "after": "ranks of a tensor-parallel group seed alike where activations are alike",
}


class Dropped(Mlp):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.dropout(super().forward(x_BSD), 0.2)


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Dropped())
    if mesh is not None:
        shard(model, mesh)
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
    rank = 0 if mesh is None else mesh.get_local_rank("tp")
    torch.manual_seed(int(ids_BS.sum()) + (rank if fault else 0))
    loss = loss_sum(model(ids_BS), labels_BS) / valid(labels_BS)
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
