"""Averaging over all ranks is undone by the number of replicas only, and not by that of ranks that share a
sequence."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import (
    HEAD,
    HEADS,
    WIDTH,
    Give,
    Small,
    attended,
    heads_of,
    loss_sum,
    over_ranks,
    sum_gradients,
    valid,
)

ABOUT = {
    "number": 37,
    "title": "The loss is scaled by replicas where all ranks are averaged",
    "sources": ["ByteDance-Seed/VeOmni#338", "NVIDIA/Megatron-LM#673"],
    "symptom": "With eight ranks to a sequence and one replica, loss and gradients are eight times too "
    "small.",
    "axis": "cp",
    "mesh": "cp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "averaged",
    "before": "loss x replicas (1), and gradients are averaged over all ranks (2)",
    "after": "loss x all ranks that are averaged",
}


class Shared(nn.Module):
    """Causal attention; ranks along cp have a part of each sequence, and gather keys and values."""

    group: ProcessGroup | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BNSH, k_BNSH, v_BNSH = (heads_of(layer(x_BSD)) for layer in (self.q, self.k, self.v))
        if self.group is None:
            return self.o(attended(q_BNSH, k_BNSH, v_BNSH))  # type: ignore[no-any-return]
        k_BNSH, v_BNSH = (Give.apply(each, 2, self.group, True) for each in (k_BNSH, v_BNSH))
        length = k_BNSH.shape[2]
        mask_ST = torch.ones(length, length, dtype=torch.bool).tril()
        mask_ST = mask_ST.chunk(self.group.size())[self.group.rank()]
        return self.o(attended(q_BNSH, k_BNSH, v_BNSH, mask_ST))  # type: ignore[no-any-return]


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Shared()
    if mesh is not None:
        block.group = mesh.get_group("cp")
    return Small(block)


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
    loss = loss_sum(model(ids_BS), labels_BS) / over_ranks(valid(labels_BS), mesh, "cp")
    if mesh is None:
        loss.backward()
    else:
        group = mesh.get_group("cp")
        (loss * (1 if fault else group.size())).backward()
        sum_gradients(model.parameters(), group, group.size())
    optimizer.step()
    return over_ranks(loss, mesh, "cp")


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
