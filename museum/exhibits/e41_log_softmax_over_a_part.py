"""A loss over a cut vocabulary picks the target's log-probability on the rank that has its column, and log-
softmax goes backward over each rank's own columns."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import VOCAB, WIDTH, Column, Leave, Mlp, Small, loss_sum, shard, summed, valid

ABOUT = {
    "number": 41,
    "title": "A vocabulary-parallel loss: ranks without the target's column get no gradient",
    "sources": ["modelscope/ms-swift#9947"],
    "symptom": "The loss is right; shards of the head that don't hold the target token get zero or a wrong "
    "gradient.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "step",
    "wrong": "head.weight",
    "reason": "gradient of a part",
    "before": "what comes back to the log-probabilities is summed over the columns of each rank",
    "after": "it is summed over the ranks too",
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
    group = None if mesh is None else mesh.get_group("tp")
    logits_BSV, n_valid = model(ids_BS), valid(labels_BS)
    if group is None:
        loss = loss_sum(logits_BSV, labels_BS) / n_valid
    else:
        logs_BSV = LogSoftmax.apply(logits_BSV, group, not fault)
        own_BS = labels_BS - group.rank() * logs_BSV.shape[-1]
        is_own_BS = (own_BS >= 0) & (own_BS < logs_BSV.shape[-1])
        target_BS = logs_BSV.gather(-1, (own_BS * is_own_BS).unsqueeze(-1)).squeeze(-1) * is_own_BS
        loss = -Leave.apply(target_BS.sum(), group) / n_valid
    loss.backward()
    optimizer.step()
    return loss.detach()


class LogSoftmax(torch.autograd.Function):
    """Of logits of which each rank has its columns."""

    @staticmethod
    def forward(ctx, logits_BSV: Tensor, group: ProcessGroup, sums_over_ranks: bool) -> Tensor:  # type: ignore[no-untyped-def]
        logs_BSV = logits_BSV - summed(logits_BSV.exp().sum(-1, keepdim=True), group).log()
        ctx.save_for_backward(logs_BSV)
        ctx.group, ctx.sums_over_ranks = group, sums_over_ranks
        return logs_BSV

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (logs_BSV,) = ctx.saved_tensors
        total_BS1 = gradient.sum(-1, keepdim=True)
        if ctx.sums_over_ranks:
            total_BS1 = summed(total_BS1, ctx.group)
        return gradient - logs_BSV.exp() * total_BS1, None, None


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
