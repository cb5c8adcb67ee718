"""What each stage of a pipeline holds, where a case asks for stages that are balanced by predicted costs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.pipeline import BALANCED, EVEN
from shardwise.core.plan import AnyPlan
from shardwise.core.prediction import Setup
from shardwise.verbs.progress import Progress

if TYPE_CHECKING:
    from shardwise.core.program import Program
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
    even = replace(case.step, stages=EVEN)

    def traced(counts: str) -> "Program":
        part = micro_batch(replace(even, stages=counts), case.mesh)
        return trace_program(source, plan, case.mesh, part, case.text, found.device, progress)

    program = traced(EVEN)
    pipeline = even.pipeline(case.mesh)
    setup = Setup(case.mesh, even.accumulation, chunks=pipeline.chunks, schedule=pipeline.schedule)
    is_dealt = even.recompute_layers is not None  # other layers run again where they are dealt otherwise
    counts = balanced_counts(
        program, found, setup, lambda counts: traced(_said(counts)) if is_dealt else program
    )
    return replace(case, step=replace(even, stages=_said(counts)))


def _said(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))
