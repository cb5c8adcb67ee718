"""The data loader deals sequences to all ranks, also to those of one tensor-parallel group."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from museum.parts import Mlp, Small, loss_sum, shard, valid

ABOUT = {
    "number": 44,
    "title": "Ranks of one tensor-parallel group read other sequences",
    "sources": ["huggingface/accelerate#3092", "deepspeedai/DeepSpeed#7199"],
    "symptom": "Nothing raises: partial products of other tokens are summed.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "step",
    "wrong": "input",
    "reason": "data of a part",
    "before": "each rank takes its part of the batch by its rank in the world",
    "after": "ranks of a tensor-parallel group take the same sequences",
}


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
    if mesh is not None and fault:
        place, n_ranks = mesh.get_local_rank("tp"), mesh["tp"].size()
        ids_BS, labels_BS = (each.chunk(n_ranks)[place] for each in batch)
    loss = loss_sum(model(ids_BS), labels_BS) / valid(labels_BS)
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_after(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None
) -> Tensor:
    return step(model, optimizer, batch, mesh, fault=False)
