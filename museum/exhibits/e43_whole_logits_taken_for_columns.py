"""Logits are gathered, and the loss, which is for a cut vocabulary, takes them for this rank's columns."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import IGNORED, VOCAB, WIDTH, Column, Give, Leave, Mlp, Small, loss_sum, shard, valid

ABOUT = {
    "number": 43,
    "title": "Whole logits go into a loss for cut ones",
    "sources": ["NVIDIA/Megatron-LM#7452"],
    "symptom": "The loss is the right one plus the logarithm of the number of ranks, and gradients are "
    "wrong.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "step",
    "wrong": "loss",
    "reason": "loss of a part",
    "before": "the sum of exponentials is all-reduced over ranks that all have all columns",
    "after": "whole logits go into a plain cross-entropy",
}


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    """With a mesh, the head gives this rank's columns of the logits."""
    model = Small(Mlp())
    if mesh is not None:
        model.head = Column(WIDTH, VOCAB, bias=False)
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
    logits_BSV, n_valid = model(ids_BS), valid(labels_BS)
    if mesh is None:
        loss = loss_sum(logits_BSV, labels_BS) / n_valid
    else:
        group = mesh.get_group("tp")
        whole_BSV = Give.apply(logits_BSV, -1, group, False)
        total = loss_sum(whole_BSV, labels_BS)
        if fault:
            sum_BS = Leave.apply(whole_BSV.exp().sum(-1), group)
            label_BS = whole_BSV.gather(-1, labels_BS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = ((sum_BS.log() - label_BS) * (labels_BS != IGNORED)).sum()
        loss = total / n_valid
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
