"""What predict takes from the tracer: one micro-batch's Program (predict/traced.py says of what)."""

from dataclasses import replace
from typing import TYPE_CHECKING

from shardwise.core.case import StepSettings, TextSource
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan
from shardwise.predict.traced import traced_mesh, without_stages
from shardwise.verbs.heads import naming_heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardwise.core.program import Program
    from shardwise.models.source import ModelSource


def trace_program(
    source: "ModelSource",
    plan: AnyPlan,
    mesh: Mesh,
    part: StepSettings,
    text: TextSource,
    device: str,
    progress: "Callable[[str], None]",
) -> "Program":
    """part: a data-parallel rank's, as micro_batch() gives it. Raises the tracer's InputErrors."""
    from shardwise.parallel.styles import is_decided_by_data
    from shardwise.text.traced_ids import token_ids
    from shardwise.trace.trace import trace

    small = traced_mesh(mesh)
    dealt = part.pipeline(mesh)
    settings = replace(without_stages(part), batch=part.batch * small.data_parallel)
    if not small.shard_axes:
        settings = replace(settings, param_dtype=None, reduce_dtype=None)
    ids = token_ids(source, settings, is_decided_by_data(plan), text, progress)
    with naming_heads(source, plan, small.tp):
        return trace(source, plan, small, settings, device=device, ids=ids, dealt=dealt, progress=progress)


def set_up() -> None:
    """What a process that does nothing but trace does first."""
    from shardwise.trace.fakes import keep_worlds
    from shardwise.trace.growth import growths
    from shardwise.trace.subject import subjects

    keep_worlds()
    growths.keep()
    subjects.keep()
