"""A tied table and head lie on the first and the last stage, and each trains on its own half of the
gradient."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, sum_gradients, valid
from museum.pipeline import Stage, run

ABOUT = {
    "number": 46,
    "title": "Tied weights of two stages are summed by nobody",
    "sources": ["uw-syfi/piper#13", "cornstarch-org/Cornstarch#16", "NVIDIA/Megatron-LM#299"],
    "symptom": "Both ends have their copy of the tied weights, and the copies drift apart.",
    "axis": "pp",
    "mesh": "pp=2",
    "kind": "step",
    "wrong": "table.weight",
    "reason": "parts not summed",
    "before": "each stage steps with its own gradient",
    "after": "the copies' gradients are summed over the two stages",
}
N_MICRO = 2


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp(), Mlp(), tied=True)
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
    loss = run(model, ids_BS, labels_BS, N_MICRO, valid(labels_BS), mesh)
    if mesh is not None and not fault:
        sum_gradients([model.get_parameter("table.weight")], mesh.get_group("pp"))
    optimizer.step()
    return loss


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
