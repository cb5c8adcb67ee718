"""What predict takes from the tracer: one micro-batch's Program on a mesh whose data-parallel axes are two ranks at most, to be rescaled.

A step over 4096 ranks then costs the trace of two. Programs can be saved, and read without torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardwise.core.case import StepSettings, TextSource
from shardwise.core.mesh import AXES, Mesh
from shardwise.core.plan import AnyPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardwise.core.program import Program
    from shardwise.models.source import ModelSource

TRACED_DATA_RANKS = 2


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's part of a step, as it is traced. batch: sequences per data-parallel rank; seq: one rank's tokens of
    each. param_dtype, reduce_dtype: of FSDP, where the mesh has it."""

    batch: int
    seq: int
    dtype: str
    param_dtype: str | None
    reduce_dtype: str | None
    recompute: str
    seed: int = 0
    random_ids: bool = False


def traced_mesh(mesh: Mesh) -> Mesh:
    """The mesh that a step runs on, with data-parallel axes of two ranks at most; context ranks are on the axis that
    they reduce gradients over."""
    sizes = {axis.role: mesh.size(axis.name) for axis in AXES if axis.runs and axis.name in dict(mesh.axes)}
    for axis in AXES:
        if axis.splits_batch and axis.role in sizes:
            ranks = sizes[axis.role] * (mesh.context if axis.name == mesh.reducing_axis else 1)
            sizes[axis.role] = min(ranks, TRACED_DATA_RANKS)
    return Mesh.of(sizes)


def trace_program(
    source: "ModelSource",
    plan: AnyPlan,
    mesh: Mesh,
    micro_batch: MicroBatch,
    device: str,
    progress: "Callable[[str], None]",
) -> "Program":
    """Raises the tracer's InputErrors."""
    from shardwise.parallel.styles import is_decided_by_data
    from shardwise.text.traced_ids import token_ids
    from shardwise.trace.trace import trace

    small = traced_mesh(mesh)
    is_fsdp = small.fsdp > 1
    settings = StepSettings(
        batch=micro_batch.batch * small.data_parallel,
        seq=micro_batch.seq,
        dtype=micro_batch.dtype,
        param_dtype=micro_batch.param_dtype if is_fsdp else None,
        reduce_dtype=micro_batch.reduce_dtype if is_fsdp else None,
        recompute=micro_batch.recompute,
        seed=micro_batch.seed,
    )
    text = TextSource(random_ids=micro_batch.random_ids)
    ids = token_ids(source, settings, is_decided_by_data(plan), text, progress)
    return trace(source, plan, small, settings, device=device, ids=ids, progress=progress)
