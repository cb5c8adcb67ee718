"""export: a plan and its case -> files for a framework, and what of the plan its format can't say, with
predict's cost of leaving that out."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from shardwise.core.case import SHARED, Case, words_of
from shardwise.core.errors import InputError, OptionError, ShardwiseError
from shardwise.core.export import Cost, Export
from shardwise.core.option import Option, check_options
from shardwise.core.plan import AnyPlan, Plan, TheirPlan
from shardwise.core.shown import told
from shardwise.export.formats import format_named, formats
from shardwise.verbs.checks import check_fsdp, check_seq
from shardwise.verbs.predict import MACHINE, Predicted
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from shardwise.export.job import Job, Written

FORMAT = "pytorch"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What only export knows."""

    framework: Annotated[
        str,
        Option(
            f"The framework's format: {', '.join(formats())}.", "The files", choices=formats(), flag="--as"
        ),
    ] = FORMAT
    cost: Annotated[
        bool, Option("Predict what it costs to leave out what the format can't say.", "The files")
    ] = True

    def __post_init__(self) -> None:
        check_options(self)


def export(
    case: Case,
    options: ExportOptions | None = None,
    progress: Progress = silent,
    *,
    plan: AnyPlan | None = None,
    folder: Path | None = None,
) -> Export:
    """The case's first plan, for its model on its mesh, as files of a framework. seq and batch: of the cost,
    as predict has them. plan: what the case's plan says, where it only has a name as yet. folder: for which
    the files are. No ranks, no GPU, no weights. Raises InputError for names that aren't known, a plan whose
    rules aren't ours, and what the format can neither say nor come near to."""
    import torch

    from shardwise.export.job import Job, resolved
    from shardwise.models.source import find_model
    from shardwise.parallel.any_plan import name_of
    from shardwise.parallel.plans import load_any_plan

    options = options or ExportOptions()
    form = format_named(options.framework)
    source = find_model(case.model)
    check_fsdp(case)
    if case.step.seq:
        check_seq(case.step.seq, source)
    name = case.plans[0] if case.plans else None
    if name is None:
        raise OptionError("no plan is named. Name a built-in one, a .toml file, or unsharded for FSDP alone.")
    if plan is None:
        plan = load_any_plan(
            name,
            sequence_parallel=case.sequence_parallel,
            family=source.family,
            context_attention=case.context_attention,
        )
    _check_ours(plan, case)
    progress(f"building {source.name}")
    model = source.build(dtype=torch.float32)
    rules = plan if isinstance(plan, Plan) else None
    assignments = resolved(model, rules, case) if rules is not None else ()
    job = Job(source, model, rules, case, command_of(case, options), assignments, folder)
    progress(f"writing it for {options.framework}")
    made = form.write(job)
    cost, why = _cost(job, made, options, progress)
    return Export(
        case.model,
        name_of(plan),
        str(case.mesh),
        options.framework,
        form.ABOUT,
        job.command,
        made.files,
        made.left_out,
        made.said.to_toml() if made.said is not None else None,
        cost,
        why,
        _prove(made, case),
        made.notes,
    )


def command_of(case: Case, options: ExportOptions) -> str:
    """The command that makes the same files, without where they go."""
    values, given = case.values(), {"model", "mesh"}
    for asked in SHARED:
        value = values[asked.key]
        is_default = value == asked.default or value in (None, ())
        if not is_default and (asked.key, value) != ("machine", MACHINE):
            given.add(asked.key)
    words = words_of(case, given - {"plans"})
    return shlex.join(["shardwise", "export", *case.plans, "--as", options.framework, *words])


def _check_ours(plan: AnyPlan, case: Case) -> None:
    """Raises OptionError for a plan without rules of ours, but where nothing is cut by rules."""
    if isinstance(plan, Plan):
        return
    if plan is TheirPlan.UNSHARDED and case.mesh.tp == 1 and case.mesh.experts == 1:
        return
    raise OptionError(
        f'plan "{plan}" has no rules of ours to export. `shardwise plan --model {case.model} --mesh '
        f"{case.mesh} --toml > mine.toml` makes a plan that has."
    )


def _prove(made: "Written", case: Case) -> str | None:
    if made.prove is None:
        return None
    module = made.files[0].name.removesuffix(".py")
    return shlex.join(
        ["shardwise", "verify", "own", "--model", f"{module}:{made.prove}", "--mesh", str(case.mesh)]
    )


def _cost(
    job: "Job", made: "Written", options: ExportOptions, progress: Progress
) -> tuple[Cost | None, str | None]:
    """predict's difference between the plan that was asked for and the one that is said."""
    if made.said is None or job.plan is None:
        return None, None
    if not options.cost:
        return None, "--no-cost was given."
    progress("predicting what it costs to leave that out")
    try:
        return _predicted_cost(job, made.said), None
    except InputError as error:
        return None, str(error)
    except ShardwiseError as error:
        return None, told(error)


def _predicted_cost(job: "Job", said: Plan) -> Cost:
    import tempfile
    from pathlib import Path

    from shardwise.verbs.predict import predict

    assert job.plan is not None
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{which}.toml" for which in ("asked", "said")]
        for path, plan in zip(paths, (job.plan, said), strict=True):
            path.write_text(plan.to_toml(), encoding="utf-8")
        case = replace(job.case, plans=tuple(map(str, paths)), machine=job.case.machine or MACHINE)
        done: Predicted = predict(case)
    asked, other = done.answer.predictions
    before = dict(asked.terms)
    apart = [(term, seconds - before.get(term, 0.0)) for term, seconds in other.terms]
    apart = [pair for pair in apart if abs(pair[1]) > 1e-3 * asked.step_s]
    return Cost(
        done.machine.name,
        asked.step_s,
        other.step_s,
        asked.memory.device_bytes,
        other.memory.device_bytes,
        other.memory.fits,
        tuple(sorted(apart, key=lambda pair: -abs(pair[1]))),
    )
