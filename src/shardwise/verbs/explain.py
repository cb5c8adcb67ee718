"""explain: a plan -> Explanation; a second one beside it -> Contrast. One step is traced on fake tensors; no
device."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from shardwise.core.case import MODEL, Case
from shardwise.core.errors import OptionError
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.mesh import RUN, Mesh, check_carried
from shardwise.core.option import Option, check_options
from shardwise.core.program import Program
from shardwise.text.traced_ids import token_ids
from shardwise.verbs.checks import check_fsdp, check_seq, default_plan
from shardwise.verbs.dealing import with_dealt_layers
from shardwise.verbs.heads import naming_heads
from shardwise.verbs.predict import MACHINE
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from shardwise.core.plan import AnyPlan
    from shardwise.models.source import ModelSource

LONG_SEQ = 8192


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """What only explain knows."""

    against: Annotated[str | None, Option("A second plan, to be put beside the first.")] = None
    rank: Annotated[int, Option("The rank whose step is shown.", MODEL, 0)] = 0
    stage: Annotated[
        int | None, Option("Its first rank's step is shown, of a pipeline's stages.", MODEL, 0, shown="none")
    ] = None
    compress: Annotated[bool, Option("Trace equal layers once; what comes out is the same.", "Output")] = True

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class Explained:
    """programs, explanations: of the plan, and of the one beside it where there is one."""

    programs: tuple[Program, ...]
    explanations: tuple[Explanation, ...]
    answer: Explanation | Contrast


def explain(case: Case, options: ExplainOptions | None = None, progress: Progress = silent) -> Explained:
    """The case's first plan, and options.against beside it. device: "auto" is cuda, of which none is needed.
    batch and seq by default: a sequence per data-parallel rank and micro-batch, of 8192 tokens or what the
    model takes. Raises InputError for names that aren't known, and for a plan that doesn't fit the model."""
    from shardwise.explain.contrast import contrast
    from shardwise.explain.explain import explain as explain_program
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan
    from shardwise.parallel.styles import is_decided_by_data

    options = options or ExplainOptions()
    check_carried(case.mesh, "explain", RUN)
    rank = _rank(options, case.mesh)
    check_fsdp(case)
    source = find_model(case.model)
    case = _with_sizes(case, source)
    check_seq(case.step.seq, source)
    names = [case.plans[0] if case.plans else default_plan(source)]
    names += [options.against] if options.against else []
    plans = [
        load_any_plan(
            name,
            sequence_parallel=case.sequence_parallel,
            family=source.family,
            context_attention=case.context_attention,
        )
        for name in names
    ]
    from shardwise.trace.trace import trace

    case = with_dealt_layers(case, source, plans[0], case.machine or MACHINE, progress)

    def traced(plan: "AnyPlan") -> Program:
        with naming_heads(source, plan, case.mesh.tp):
            return trace(
                source,
                plan,
                case.mesh,
                case.step,
                device="cuda" if case.device == "auto" else case.device,
                rank=rank,
                ids=token_ids(source, case.step, is_decided_by_data(plan), case.text, progress),
                compress=options.compress,
                progress=progress,
            )

    programs = tuple(map(traced, plans))
    progress("explaining")
    explanations = tuple(map(explain_program, programs))
    answer = contrast(*explanations) if len(explanations) > 1 else explanations[0]
    return Explained(programs, explanations, answer)


def _rank(options: ExplainOptions, mesh: Mesh) -> int:
    """Raises OptionError for a stage that the mesh hasn't."""
    if options.stage is None:
        return options.rank
    if options.rank or options.stage >= mesh.stages:
        what = "leave one of --rank and --stage out" if options.rank else f"use 0 to {mesh.stages - 1}"
        raise OptionError(f"--stage {options.stage}: mesh {mesh} has {mesh.stages} stages; {what}.")
    return options.stage * (mesh.world_size // mesh.stages)


def _with_sizes(case: Case, source: "ModelSource") -> Case:
    """A batch and a sequence where the case has none."""
    batch = case.step.batch or case.mesh.data_parallel * case.step.accumulation
    seq = case.step.seq or min(LONG_SEQ, source.max_seq or LONG_SEQ)
    return replace(case, step=replace(case.step, batch=batch, seq=seq))
