"""The schedule goes backward from the sum over labels, and the division comes later, for the log."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, valid
from museum.pipeline import Stage, run

ABOUT = {
    "number": 48,
    "title": "A pipeline goes backward from a loss that isn't divided yet",
    "sources": ["pytorch/torchtitan#2972"],
    "symptom": "Gradients are as many times larger than without a pipeline as labels count in the batch.",
    "axis": "pp",
    "mesh": "pp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "summed too often",
    "before": "losses are divided after the backward, for the report",
    "after": "each loss is divided before its backward",
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
    late = mesh is not None and fault
    loss = run(model, ids_BS, labels_BS, N_MICRO, 1.0 if late else valid(labels_BS), mesh)
    optimizer.step()
    return loss / valid(labels_BS) if late else loss


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
