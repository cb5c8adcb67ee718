"""Replicas sum gradients over their own group, which has none of the ranks that share a sequence."""

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
    "number": 35,
    "title": "Ranks that share a sequence aren't in the group over which gradients are summed",
    "sources": ["ByteDance-Seed/VeOmni#1115"],
    "symptom": "With one replica the all-reduce is a silent no-op: each rank keeps the gradient of its "
    "part of "
    "the sequence.",
    "axis": "cp",
    "mesh": "cp=2",
    "kind": "step",
    "wrong": "all gradients",
    "reason": "parts not summed",
    "before": "DDP's group is that of the data-parallel axis alone",
    "after": "gradients are summed over the axis that cuts sequences too",
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
    loss.backward()
    if mesh is not None and not fault:
        sum_gradients(model.parameters(), mesh.get_group("cp"))
    optimizer.step()
    return over_ranks(loss, mesh, "cp")


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
