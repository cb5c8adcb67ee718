"""A recipe multiplies the loss by the number of replicas, to undo their averaging; but its loss is a local
mean."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, over_ranks, sum_gradients

ABOUT = {
    "number": 31,
    "title": "A local mean is multiplied by the number of replicas",
    "sources": ["NVIDIA-NeMo/Automodel#3846"],
    "symptom": "Gradients are as many times too large as there are replicas.",
    "axis": "dp",
    "mesh": "dp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "summed too often",
    "before": "loss = mean over this rank's sequences x replicas, then gradients are averaged",
    "after": "the mean over this rank's sequences, and gradients are averaged",
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
    # every token counts here, so that the mean of the ranks' means is the mean
    labels_BS = labels_BS.clamp(min=0)
    mean = loss_sum(model(ids_BS), labels_BS) / labels_BS.numel()
    if mesh is None:
        mean.backward()
    else:
        group = mesh.get_group("dp")
        (mean * (group.size() if fault else 1.0)).backward()
        sum_gradients(model.parameters(), group, group.size())
        mean = over_ranks(mean, mesh, "dp") / group.size()
    optimizer.step()
    return mean.detach()


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
