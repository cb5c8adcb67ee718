"""Two stages of a model on two ranks, and a schedule that runs micro-batches through them, one after the
other. Right: what is wrong stands in the exhibits."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import WIDTH, Small, loss_sum, over_ranks


class Stage(nn.Module):
    """The first stage has the table and the first block, the last one the second block, the norm and the head
    (and a tied table), under the whole model's names."""

    def __init__(self, model: Small, mesh: DeviceMesh) -> None:
        super().__init__()
        self.is_first = mesh.get_local_rank("pp") == 0
        at = 0 if self.is_first else 1
        self.blocks = nn.ModuleDict({str(at): model.blocks[at]})
        if self.is_first or model.head.weight is model.table.weight:
            self.table = model.table
        if not self.is_first:
            self.norm, self.head = model.norm, model.head

    def forward(self, given: Tensor) -> Tensor:
        """Ids, or what the stage before gives -> what goes on, or logits."""
        x_BSD: Tensor = self.table(given) if self.is_first else given
        for block in self.blocks.values():
            x_BSD = x_BSD + block(x_BSD)
        return x_BSD if self.is_first else self.head(self.norm(x_BSD))


def run(
    model: nn.Module,
    ids_BS: Tensor,
    labels_BS: Tensor,
    n_micro: int,
    n_valid: Tensor | float,
    mesh: DeviceMesh | None,
) -> Tensor:
    """Forward and backward of a batch in n_micro micro-batches; the sum of their losses, each divided by
    n_valid, on every rank."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for ids, labels in zip(ids_BS.chunk(n_micro), labels_BS.chunk(n_micro), strict=True):
        if mesh is None:
            loss = loss_sum(model(ids), labels) / n_valid
            loss.backward()
            total = total + loss.detach()
        else:
            total = total + _through(model, ids, labels, n_valid)
    return over_ranks(total, mesh, "pp")


def _through(model: nn.Module, ids_BS: Tensor, labels_BS: Tensor, n_valid: Tensor | float) -> Tensor:
    """One micro-batch on this rank's stage; its loss, which only the last stage has."""
    passed_BSD = torch.empty(*ids_BS.shape, WIDTH, dtype=next(model.parameters()).dtype)
    if dist.get_rank() == 0:
        out_BSD = model(ids_BS)
        dist.send(out_BSD.detach(), 1)
        dist.recv(passed_BSD, 1)
        out_BSD.backward(passed_BSD)
        return passed_BSD.new_zeros(())
    dist.recv(passed_BSD, 0)
    passed_BSD.requires_grad_()
    loss = loss_sum(model(passed_BSD), labels_BS) / n_valid
    loss.backward()
    assert passed_BSD.grad is not None
    dist.send(passed_BSD.grad, 0)
    return loss.detach()
