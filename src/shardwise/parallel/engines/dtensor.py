"""The dtensor engine: a plan carried out by PyTorch's own ParallelStyles, as torchtitan's 2025 plan had them.
A peer is not mended."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.placement import Shard
from shardwise.core.plan import Plan
from shardwise.parallel.loss import DTensorLoss, Loss, PlainLoss
from shardwise.parallel.resolve import head_of, resolve


def apply_dtensor(model: nn.Module, plan: Plan, mesh: DeviceMesh, *, fsdp: int) -> Loss:
    """Parallelizes `model` in place with torch.distributed.tensor.parallel. Returns the loss for its logits.
    fsdp: see resolve()."""
    tp_mesh = mesh[TENSOR_AXIS] if mesh.ndim > 1 else mesh
    assignments = resolve(model, plan, tp=tp_mesh.size(), fsdp=fsdp)
    head = head_of(model)
    loss: Loss = PlainLoss()
    twins: dict[str, ParallelStyle] = {}
    for assignment in assignments:
        keeps_dtensor = assignment.module is head and assignment.style.output in (None, Shard(-1))
        if keeps_dtensor:
            loss = DTensorLoss()
        twin = assignment.sharder.twin(assignment, keeps_dtensor=keeps_dtensor)
        assert twin is not None, "resolve() refuses what PyTorch has no style for"
        twins[assignment.name] = twin
    parallelize_module(model, tp_mesh, twins)
    return loss
