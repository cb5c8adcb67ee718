"""What each stage of a pipeline holds, where a case asks for stages that are balanced by predicted costs."""

from dataclasses import replace
from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.pipeline import BALANCED, EVEN
from shardwise.core.plan import AnyPlan
from shardwise.core.prediction import Setup
from shardwise.verbs.progress import Progress

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource


def with_dealt_layers(
    case: Case, source: "ModelSource", plan: AnyPlan, machine: str, progress: Progress
) -> Case:
    """The case with counts of layers in the place of `balanced`, from one micro-batch that is traced and
    costed on `machine`. Batch and seq are known. Raises the tracer's InputErrors."""
    if case.step.stages != BALANCED or case.mesh.stages == 1:
        return case
    from shardwise.predict.layout import balanced_counts
    from shardwise.predict.machines import load_machine
    from shardwise.predict.traced import micro_batch
    from shardwise.verbs.programs import trace_program

    found = load_machine(machine)
    part = micro_batch(case.step, case.mesh)
    program = trace_program(source, plan, case.mesh, part, case.text, found.device, progress)
    even = replace(case.step, stages=EVEN)
    pipeline = even.pipeline(case.mesh)
    setup = Setup(case.mesh, even.accumulation, chunks=pipeline.chunks, schedule=pipeline.schedule)
    counts = balanced_counts(program, found, setup)
    return replace(case, step=replace(even, stages=",".join(map(str, counts))))
