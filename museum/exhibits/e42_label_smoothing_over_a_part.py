"""Label smoothing over a cut vocabulary takes the mean of log-probabilities over this rank's columns."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import IGNORED, VOCAB, WIDTH, Column, Leave, Mlp, Small, shard, valid

ABOUT = {
    "number": 42,
    "title": "Label smoothing takes a rank's columns for the vocabulary",
    "sources": ["NVIDIA/Megatron-LM#737", "NVIDIA/Megatron-LM#7464", "NVIDIA/Megatron-LM#5522"],
    "symptom": "The loss differs between tensor-parallel ranks, and loss and gradients from one process.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "step",
    "wrong": "loss",
    "reason": "loss of a part",
    "before": "the mean log-probability is that of the local columns",
    "after": "columns' sums are all-reduced and divided by the vocabulary",
}
SMOOTH = 0.1


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
    group = None if mesh is None else mesh.get_group("tp")
    logits_BSV, n_valid = model(ids_BS), valid(labels_BS)
    if group is None:
        flat = logits_BSV.flatten(0, 1)
        loss = F.cross_entropy(flat, labels_BS.flatten(), ignore_index=IGNORED, label_smoothing=SMOOTH)
    else:
        loss = vocabulary_loss(logits_BSV, labels_BS, group, over_all=not fault) / n_valid
    loss.backward()
    optimizer.step()
    return loss.detach()


def vocabulary_loss(logits_BSV: Tensor, labels_BS: Tensor, group: ProcessGroup, over_all: bool) -> Tensor:
    """The sum over labels that count; logits are this rank's columns."""
    width = logits_BSV.shape[-1]
    exponentials_BS = logits_BSV.exp().sum(-1)  # logits are small here
    own_BS = labels_BS - group.rank() * width
    is_own_BS = (own_BS >= 0) & (own_BS < width)
    target_BS = logits_BSV.gather(-1, own_BS.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1) * is_own_BS
    log_BS = Leave.apply(exponentials_BS, group).log()
    label_BS = Leave.apply(target_BS, group)
    mean_BS = logits_BSV.mean(-1)
    if over_all:
        mean_BS = Leave.apply(logits_BSV.sum(-1), group) / (width * group.size())
    smoothed_BS = (1 - SMOOTH) * label_BS + SMOOTH * mean_BS
    total: Tensor = ((log_BS - smoothed_BS) * (labels_BS != IGNORED)).sum()
    return total


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
