"""A parameter is left out of FSDP, and so of its reduction: each rank trains it on its own sequences."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, over_ranks, sum_gradients, valid

ABOUT = {
    "number": 33,
    "title": "Parameters that FSDP ignores are summed by nobody",
    "sources": ["pytorch/pytorch#98281", "BrotherHappy/OSTQuant#15"],
    "symptom": "Ignored modules learn from one rank's data, and differ between ranks.",
    "axis": "fsdp",
    "mesh": "fsdp=2",
    "kind": "step",
    "wrong": "norm.weight",
    "reason": "parts not summed",
    "before": "the norm is in ignored_params and nothing else reduces it",
    "after": "the step sums its gradient over the ranks",
}


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp())
    if mesh is not None:
        sharded = fully_shard(model, mesh=mesh["fsdp"], ignored_params={model.norm.weight})
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
    if mesh is not None and not fault:
        sum_gradients([model.get_parameter("norm.weight")], mesh.get_group("fsdp"))
    optimizer.step()
    return over_ranks(loss, mesh, "fsdp")


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
