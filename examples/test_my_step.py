"""Your own training step, held against one process, as a test of yours:

    pytest examples/test_my_step.py

It starts four ranks on this machine's CPU. Where the step doesn't do what it does on one process, the test
says what is wrong first, and what to do.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import shardwise
from examples.train_your_model import PLAN, Writer
from shardwise.testing import assert_trains_like_one_rank


def build(mesh: DeviceMesh | None = None) -> nn.Module:
    """The model; given a mesh, this rank's part of it."""
    model = Writer(longest=16)
    if mesh is not None:
        shardwise.parallelize(model, shardwise.Plan.from_toml(PLAN), mesh)
        fully_shard(model, mesh=mesh["fsdp"])
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sum gradients: the loss is divided by all labels already
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    mesh: DeviceMesh | None = None,
) -> tuple[Tensor, Tensor]:
    """One step on this rank's part of the batch, of whose labels some don't count; loss and gradient norm."""
    ids_BS, labels_BS = batch
    labels = (labels_BS != -100).sum()
    if mesh is not None:
        dist.all_reduce(labels, group=mesh.get_group("fsdp"))
    loss = shardwise.loss_of(model)(model(ids_BS), labels_BS, valid=labels)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def test_my_step_trains_like_one_rank() -> None:
    assert_trains_like_one_rank(train_step, build, optimizer=make_optimizer, mesh="fsdp=2,tp=2")
