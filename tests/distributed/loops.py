"""Training loops as people write them, right ones and ones with a planted fault: for test_own_step.py.

B batch, S sequence, V vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardwise

VOCAB = 40
MAX_NORM = 0.1
PLAN = """
[rules]
"table" = { style = "rowwise", output = "replicate" }
"norm" = "replicate"
"up" = "colwise"
"down" = "rowwise"
"head" = { style = "colwise", output = "replicate" }
"""
Optimizer = torch.optim.Optimizer
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """ids [B, S] -> logits [B, S, V]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(VOCAB, 12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, VOCAB, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.norm(self.table(ids_BS))
        logits_BSV: Tensor = self.head(x_BSH + self.drop(self.down(self.up(x_BSH).relu())))
        return logits_BSV


# ------------------------------------------------------------------------------------------ models


def by_torch(mesh: DeviceMesh | None = None) -> nn.Module:
    """PyTorch's styles over tp; what has none is left plain."""
    model = Net()
    if mesh is not None:
        parallelize_module(
            model, mesh["tp"] if mesh.ndim > 1 else mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
        )
    return model


def all_dtensors(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net()
    if mesh is not None:
        shardwise.parallelize(model, shardwise.Plan.from_toml(PLAN), mesh)
    return model


def by_fsdp(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net()
    if mesh is not None:
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def summing_fsdp(mesh: DeviceMesh | None = None) -> nn.Module:
    """FSDP2 sums what each rank has divided by the whole batch's labels."""
    model = by_fsdp(mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def fsdp_over_tp(mesh: DeviceMesh | None = None) -> nn.Module:
    model = all_dtensors(mesh)
    if mesh is not None:
        fully_shard(model, mesh=mesh["fsdp"])
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def by_ddp(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net()
    return model if mesh is None else DistributedDataParallel(model, process_group=mesh.get_group())


def copies(mesh: DeviceMesh | None = None) -> nn.Module:
    """Whole on each rank; the step sums gradients by hand."""
    return Net()


class Counting(Net):
    """Counts the tokens that it has seen; each rank its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(()))

    def forward(self, ids_BS: Tensor) -> Tensor:
        self.get_buffer("tokens").add_(ids_BS.numel())
        return super().forward(ids_BS)


def counting(mesh: DeviceMesh | None = None) -> nn.Module:
    return Counting()


def dropping(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net(dropout=0.5)
    if mesh is not None:
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def dropping_seeded_apart(mesh: DeviceMesh | None = None) -> nn.Module:
    model = dropping(mesh)
    torch.manual_seed(dist.get_rank())
    return model


def with_an_early_optimizer(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Net()
    model.optimizer = adamw(model)  # type: ignore[assignment]
    if mesh is not None:
        shardwise.parallelize(model, shardwise.Plan.from_toml(PLAN), mesh)
    return model


# -------------------------------------------------------------------------------------- optimizers


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)


def the_early_one(model: nn.Module) -> Any:
    return model.optimizer


def decaying_what_is_sharded(model: nn.Module) -> Optimizer:
    """Sorts parameters by what sharding has made of them."""
    sharded = [each for each in model.parameters() if isinstance(each, DTensor)]
    others = [each for each in model.parameters() if not isinstance(each, DTensor)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": sharded, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)


def with_a_schedule(model: nn.Module) -> tuple[Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


# ------------------------------------------------------------------------------------------- steps


def loss_of(model: nn.Module, batch: Batch, count: Tensor | int | None = None) -> Tensor:
    """The mean over the labels that count, or the sum of theirs divided by `count`."""
    ids_BS, labels_BS = batch
    logits_BSV = model(ids_BS)
    flat = logits_BSV.flatten(0, 1), labels_BS.flatten()
    if count is None:
        return F.cross_entropy(*flat)
    return F.cross_entropy(*flat, reduction="sum") / count


def end_of(model: nn.Module, optimizer: Optimizer, loss: Tensor) -> tuple[Tensor, Any]:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def plain(model: nn.Module, batch: Batch, optimizer: Optimizer) -> tuple[Tensor, Any]:
    """Right where all parameters are DTensors of one mesh, or none is."""
    loss = loss_of(model, batch)
    loss.backward()
    return end_of(model, optimizer, loss)


def without_clipping(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def by_all_labels(model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None) -> Any:
    """Each rank divides by the whole batch's labels; what sums gradients doesn't average."""
    count = (batch[1] >= 0).sum()
    if mesh is not None:
        dist.all_reduce(count, group=mesh.get_group(0))
    loss = loss_of(model, batch, count)
    loss.backward()
    return end_of(model, optimizer, loss)


def by_all_labels_under_ddp(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Any:
    """DDP averages, so the sum is the ranks' number times as large. As a process alone it asks
    torch.distributed."""
    count, n = (batch[1] >= 0).sum(), dist.get_world_size()
    dist.all_reduce(count)
    loss = loss_of(model, batch, count) * n
    loss.backward()
    return end_of(model, optimizer, loss / n)


def summed_by_hand(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Any:
    count = (batch[1] >= 0).sum()
    dist.all_reduce(count)
    loss = loss_of(model, batch, count)
    loss.backward()
    for each in model.parameters():
        dist.all_reduce(each.grad)
    return end_of(model, optimizer, loss)


def summed_by_nobody(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Any:
    loss = loss_of(model, batch)
    loss.backward()
    return end_of(model, optimizer, loss)


def scaled_by_the_ranks(model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None) -> Any:
    """The loss is summed over ranks that all have the whole of it."""
    optimizer.zero_grad()
    loss = loss_of(model, batch) * (1 if mesh is None else mesh.size())
    loss.backward()
    optimizer.step()


def clipped_by_the_local_norm(
    model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None
) -> Any:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    held = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    norm = torch.stack([each.norm() for each in held]).norm()
    for each in held:
        each.mul_((MAX_NORM / norm).clamp(max=1.0))
    optimizer.step()
    return loss, norm


def other_ids_on_each_rank(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Any:
    ids_BS, labels_BS = batch
    return without_clipping(model, (ids_BS.roll(dist.get_rank(), 1), labels_BS), optimizer)


def scheduled(model: nn.Module, batch: Batch, optimizer: tuple[Optimizer, Any]) -> Any:
    loss = without_clipping(model, batch, optimizer[0])
    optimizer[1].step()
    return loss


def scheduled_on_rank_0(model: nn.Module, batch: Batch, optimizer: tuple[Optimizer, Any]) -> Any:
    loss = without_clipping(model, batch, optimizer[0])
    if dist.get_rank() == 0:
        optimizer[1].step()
    return loss


def zeroing_nothing(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Any:
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def accumulating(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Any:
    """Two micro-batches, each divided by all labels."""
    count = (batch[1] >= 0).sum()
    total = torch.zeros(())
    for ids_BS, labels_BS in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        loss = loss_of(model, (ids_BS, labels_BS), count)
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total


def raising(model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None) -> Any:
    if mesh is not None and dist.get_rank() == 1:
        raise ValueError("no such thing")
    return without_clipping(model, batch, optimizer)


def raising_alone(model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None) -> Any:
    if mesh is None:
        raise ValueError("no such thing")


def hanging(model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None) -> Any:
    if mesh is not None and dist.get_rank() == 1:
        dist.barrier(mesh.get_group())
    return without_clipping(model, batch, optimizer)


Step = Callable[..., Any]


def nudged_on_rank_1(model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None) -> Any:
    """Something changes a weight that is the same on all ranks, on one of them."""
    loss = without_clipping(model, batch, optimizer)
    if mesh is not None and dist.get_rank() == 1:
        with torch.no_grad():
            model.get_parameter("norm.weight").add_(1e-3)
    return loss


def returning_part_of_the_loss(
    model: nn.Module, batch: Batch, optimizer: Optimizer, mesh: DeviceMesh | None
) -> Any:
    loss = without_clipping(model, batch, optimizer)
    return loss / (1 if mesh is None else 3)
