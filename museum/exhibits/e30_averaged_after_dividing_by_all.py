"""The loss is divided by all labels of the global batch, and then replicas are averaged."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, over_ranks, sum_gradients, valid

ABOUT = {
    "number": 30,
    "title": "Replicas average gradients whose loss was divided by the global batch already",
    "sources": ["pytorch/torchtitan#2318", "pytorch/torchtitan#2323"],
    "symptom": "Gradient norms are 1/replicas of FSDP's; the loss of short runs looks the same, since AdamW "
    "takes no notice of a scale.",
    "axis": "dp",
    "mesh": "dp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "averaged",
    "before": "DDP divides by the number of replicas",
    "after": "gradients are summed",
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
    loss = loss_sum(model(ids_BS), labels_BS) / over_ranks(valid(labels_BS), mesh, "dp")
    loss.backward()
    if mesh is not None:
        group = mesh.get_group("dp")
        sum_gradients(model.parameters(), group, group.size() if fault else 1.0)
    optimizer.step()
    return over_ranks(loss, mesh, "dp")


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
