"""What of a step is traced for predict: one micro-batch, on a mesh whose axes dp and fsdp have two ranks
at most, to be rescaled. A step over 4096 ranks then costs the trace of two."""

from dataclasses import replace

from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import AXES, Mesh, Role
from shardwise.core.pipeline import EVEN
from shardwise.predict.check import RESCALED

TRACED_DATA_RANKS = 2


def micro_batch(settings: StepSettings, mesh: Mesh) -> StepSettings:
    """One data-parallel rank's part of a step, as it is traced: its sequences of one micro-batch; one context
    rank's tokens of each, where no step runs over context ranks. How layers are dealt to stages stays where a
    part of them runs again: it says which ones do. Raises OptionError for a sequence that can't be cut into
    equal parts."""
    context = mesh.context // traced_mesh(mesh).context
    if settings.seq % context:
        raise OptionError(
            f"--seq {settings.seq} can't be cut into {context} parts for cp={context}. Use a multiple of it."
        )
    batch = settings.batch // (mesh.data_parallel * settings.accumulation)
    alone = replace(settings, accumulation=1, batch=batch, seq=settings.seq // context)
    return alone if settings.recompute_layers is not None else without_stages(alone)


def without_stages(settings: StepSettings) -> StepSettings:
    """As one micro-batch is traced, of which a pipeline's stages are made."""
    return replace(settings, schedule=None, chunks=1, stages=EVEN)


def traced_mesh(mesh: Mesh) -> Mesh:
    """The mesh that a step runs on, without stages, with axes dp and fsdp of two ranks at most. Context ranks
    that no step runs over are on the axis that they reduce gradients over."""
    named = dict(mesh.axes)
    traced = [axis for axis in AXES if axis.runs and axis.name in named and axis.role is not Role.CUTS_DEPTH]
    joining = 1 if any(axis.role is Role.CUTS_SEQUENCE for axis in traced) else mesh.context
    sizes = {axis.role: mesh.size(axis.name) for axis in traced}
    for axis in traced:
        if axis.role in RESCALED:
            ranks = sizes[axis.role] * (joining if axis.name == mesh.reducing_axis else 1)
            sizes[axis.role] = min(ranks, TRACED_DATA_RANKS)
    return Mesh.of(sizes)
