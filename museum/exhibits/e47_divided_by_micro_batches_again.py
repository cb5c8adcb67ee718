"""The loss of each micro-batch is divided by all labels already, and the schedule divides by the micro-
batches again."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, valid
from museum.pipeline import Stage, run

ABOUT = {
    "number": 47,
    "title": "A pipeline's schedule divides by the number of micro-batches once more",
    "sources": ["areal-project/AReaL#1273"],
    "symptom": "The gradient norm is 1/micro-batches of that of another engine on the same data.",
    "axis": "pp",
    "mesh": "pp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "averaged",
    "before": "the schedule divides each loss by the number of micro-batches",
    "after": "the loss is multiplied by it beforehand",
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
    divisor = valid(labels_BS) * (N_MICRO if mesh is not None and fault else 1)
    loss = run(model, ids_BS, labels_BS, N_MICRO, divisor, mesh) * divisor / valid(labels_BS)
    optimizer.step()
    return loss


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
