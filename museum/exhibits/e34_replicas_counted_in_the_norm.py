"""The norm sums squares over the tensor-parallel ranks, also of what each of them holds whole."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from museum.parts import Mlp, Small, local, loss_sum, over_ranks, shard, valid

ABOUT = {
    "number": 34,
    "title": "Gradients that ranks hold alike are counted by each of them in the norm",
    "sources": ["NVIDIA-NeMo/RL#3788", "ROCm/TransformerEngine#715", "mindspore-ai/hyper-parallel#279"],
    "symptom": "The reported gradient norm is too large (1.4 to 1.5 times on eight ranks), and clipping "
    "comes "
    "too early.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "step",
    "wrong": "gradient norm",
    "reason": "norm of a part",
    "before": "one all-reduce of all squares over tp",
    "after": "squares of replicated gradients are added after the all-reduce",
}
MOST_NORM = 0.1


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp())
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
    loss = loss_sum(model(ids_BS), labels_BS) / valid(labels_BS)
    loss.backward()
    cut = [each.grad for each in model.parameters() if isinstance(each, DTensor)]
    whole = [each.grad for each in model.parameters() if not isinstance(each, DTensor)]
    squares, of_whole = (squares_of(each) for each in (cut, whole))
    if fault:
        squares, of_whole = squares + of_whole, torch.zeros(())
    norm = (over_ranks(squares, mesh, "tp") + of_whole).sqrt()
    for gradient in cut + whole:
        if gradient is not None:
            local(gradient).mul_((MOST_NORM / norm).clamp(max=1.0))
    optimizer.step()
    return loss.detach()


def squares_of(gradients: Sequence[Tensor | None]) -> Tensor:
    squares = torch.zeros(())
    for each in gradients:
        squares = squares if each is None else squares + local(each).square().sum()
    return squares


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
