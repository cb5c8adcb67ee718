"""The dtensor engine: a plan carried out by PyTorch's own ParallelStyles, as torchtitan's 2025 plan had them. A peer is not mended."""

import inspect

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shardwise.core import placement as ours
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.plan import Plan, StyleName
from shardwise.parallel.loss import DTensorLoss, Loss, PlainLoss
from shardwise.parallel.parameters import to_torch
from shardwise.parallel.resolve import Assignment, last_linear, resolve


class _Replicated(ParallelStyle):
    """Parameters as Replicate DTensors, plain tensors in and out: what a module outside sequence parallelism needs."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def to_dtensor(_: nn.Module, inputs: tuple[object, ...], mesh: DeviceMesh) -> tuple[object, ...]:
            return tuple(
                DTensor.from_local(x, mesh, [Replicate()], run_check=False)
                if isinstance(x, Tensor) and not isinstance(x, DTensor)
                else x
                for x in inputs
            )

        def to_local(_: nn.Module, output: DTensor, __: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, None, to_dtensor, to_local)  # type: ignore[arg-type]  # its hooks may return values


def apply_dtensor(model: nn.Module, plan: Plan, mesh: DeviceMesh, *, fsdp: int) -> Loss:
    """Parallelizes `model` in place with torch.distributed.tensor.parallel. Returns the loss for its logits. fsdp: see resolve()."""
    tp_mesh = mesh[TENSOR_AXIS] if mesh.ndim > 1 else mesh
    assignments = resolve(model, plan, tp=tp_mesh.size(), fsdp=fsdp)
    head = last_linear(model)
    loss: Loss = PlainLoss()
    styles: dict[str, ParallelStyle] = {}
    for assignment in assignments:
        keeps_dtensor = assignment.module is head and assignment.rule.style.output in (None, ours.Shard(-1))
        if keeps_dtensor:
            loss = DTensorLoss()
        styles[assignment.name] = _style(assignment, keeps_dtensor)
    parallelize_module(model, tp_mesh, styles)
    return loss


def _style(assignment: Assignment, keeps_dtensor: bool) -> ParallelStyle:
    style, module = assignment.rule.style, assignment.module
    is_embedding = isinstance(module, nn.Embedding)
    match style.name:
        case StyleName.ROWWISE if is_embedding:
            return RowwiseParallel(input_layouts=Replicate(), output_layouts=_or(style.output, Shard(1)))
        case StyleName.COLWISE if is_embedding:
            return ColwiseParallel(output_layouts=_or(style.output, Shard(1)))
        case StyleName.ROWWISE:
            return RowwiseParallel(
                input_layouts=_or(style.input, Shard(-1)), output_layouts=_or(style.output, Replicate())
            )
        case StyleName.COLWISE:
            return ColwiseParallel(
                input_layouts=_or(style.input, Replicate()),
                output_layouts=_or(style.output, Shard(-1)),
                use_local_output=not keeps_dtensor,
            )
        case StyleName.SEQUENCE_PARALLEL:
            return SequenceParallel()
        case StyleName.GATHER_INPUT:
            n_inputs = len(inspect.signature(module.forward).parameters)
            return PrepareModuleInput(
                input_layouts=(_or(style.input, Shard(1)), *[None] * (n_inputs - 1)),
                desired_input_layouts=(Replicate(), *[None] * (n_inputs - 1)),
            )
        case StyleName.REPLICATE:
            return _Replicated()
        case StyleName.ROUTED | StyleName.REPLICATED:
            raise AssertionError("resolve() refuses what PyTorch has no style for")


def _or(placement: ours.Placement | None, default: Placement) -> Placement:
    return default if placement is None else to_torch(placement)
