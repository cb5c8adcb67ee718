"""`shardwise predict`: time and memory of plans on a machine that needn't be there, term by term."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from shardwise.cli.config import read_config
from shardwise.cli.options import (
    DTYPES,
    STEP,
    ParamDtype,
    ReduceDtype,
    check_choice,
    check_dtypes,
    check_precision,
    check_seq,
    default_plan,
)
from shardwise.cli.saved_program import load_program, write_program
from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import PREDICTED, Mesh, Role, check_carried
from shardwise.core.plan import suggest
from shardwise.core.prediction import AttentionKernel, Precision, Prediction, Setup, Term
from shardwise.core.shown import shown
from shardwise.verbs.programs import MicroBatch, trace_program
from shardwise.verbs.sweep import MICRO_BATCHES, SweepTask
from shardwise.verbs.sweep import sweep as sweep_over

if TYPE_CHECKING:
    from shardwise.core.machine import Machine
    from shardwise.core.prediction_run import PredictionRun
    from shardwise.core.program import Program
    from shardwise.models.source import ModelSource

# what a Setup adds to a trace without recompute; the others of RECOMPUTE are traced
SELECTIVE = "selective"
RECOMPUTE = ("none", SELECTIVE, "selective-ops", "full")
MATMUL_DTYPES = ("float8",)
TERM_NAMES = {term.name.lower(): term for term in Term}
# what a saved program has decided already, what a sweep goes over or has no use for, and what is a sweep's alone
_OF_PROGRAM = (
    "plans",
    "model",
    "batch",
    "seq",
    "dtype",
    "param_dtype",
    "reduce_dtype",
    "random_ids",
    "save_program",
)
_NOT_SWEPT = ("program", "save_program")
_OF_SWEEP = ("devices", "micro_batches")
_MODEL, _RUN, _SWEEP, _OUTPUT = "Model and mesh", "How it runs", "Sweep", "Output"


def _in_the_mesh(value: str | None) -> None:
    if value is not None:
        raise OptionError(
            "stages and context ranks are axes of the mesh. "
            "Instead of --stages 8 --context 2 write --mesh pp=8,cp=2,tp=8."
        )


def predict(
    context: typer.Context,
    plans: Annotated[
        list[str] | None,
        typer.Argument(
            help="Built-in plans, .toml files, hf, own or unsharded; the first is what the others are held against.",
            show_default="rowwise; hf for an hf: model",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="The same options as TOML, or the name of a shipped config (llama3_8b_tp8).",
            callback=read_config,
            is_eager=True,
        ),
    ] = None,
    machine: Annotated[
        str,
        typer.Option(
            help="A machine of `shardwise machines`, or a .toml file of yours.", rich_help_panel=_MODEL
        ),
    ] = "h100-sxm-80gb",
    model: Annotated[
        str,
        typer.Option(
            help="A model of `shardwise models`, hf:TYPE, hf:PATH or package.module:factory.",
            rich_help_panel=_MODEL,
        ),
    ] = "llama3-8b",
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Axes of ranks, such as pp=4,fsdp=8,cp=2,tp=8: pipeline stages (1F1B), data-parallel, context and tensor-parallel ranks.",
            show_default="tp=8; the program's own with --program",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    _moved: Annotated[
        str | None, typer.Option("--stages", "--context", hidden=True, callback=_in_the_mesh)
    ] = None,
    chunks: Annotated[
        int,
        typer.Option(
            help="Of layers that each stage holds: more than 1 is the interleaved schedule.",
            min=1,
            rich_help_panel=_MODEL,
        ),
    ] = 1,
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Activations cut along the sequence between blocks.",
            rich_help_panel=_MODEL,
        ),
    ] = True,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences per optimizer step over all ranks.",
            min=1,
            show_default="one per data-parallel rank and micro-batch",
            rich_help_panel=STEP,
        ),
    ] = None,
    seq: Annotated[int, typer.Option(help="Tokens per sequence.", min=1, rich_help_panel=STEP)] = 8192,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Of parameters, gradients and optimizer state: {', '.join(DTYPES)}.", rich_help_panel=STEP
        ),
    ] = "float32",
    param_dtype: ParamDtype = None,
    reduce_dtype: ReduceDtype = None,
    accumulation: Annotated[
        int, typer.Option(help="Micro-batches that a step's batch is cut into.", min=1, rich_help_panel=STEP)
    ] = 1,
    recompute: Annotated[
        str,
        typer.Option(
            help="Again in the backward: none, selective (unfused attention), selective-ops (all of a layer but fused attention and every second matmul) or full.",
            rich_help_panel=STEP,
        ),
    ] = "none",
    random_ids: Annotated[
        bool,
        typer.Option(
            "--random-ids", help="Uniform random ids instead of text, for routed plans.", rich_help_panel=STEP
        ),
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(help="fused or unfused.", show_default="as the traced op says", rich_help_panel=_RUN),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled/--eager", help="Kernels between matmuls fused by a compiler.", rich_help_panel=_RUN
        ),
    ] = False,
    compiled_loss: Annotated[
        bool,
        typer.Option(
            "--compiled-loss/--eager-loss",
            help="The loss is fused too: no copy of the logits in float32.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    matmul_dtype: Annotated[
        str | None,
        typer.Option(
            help="What linear layers multiply in: float8.", show_default="the --dtype", rich_help_panel=_RUN
        ),
    ] = None,
    overlap_data: Annotated[
        bool,
        typer.Option(
            "--overlap-data", help="Gradients over dp are reduced beside the backward.", rich_help_panel=_RUN
        ),
    ] = False,
    overlap_tensor: Annotated[
        bool,
        typer.Option(
            "--overlap-tensor",
            help="Collectives over tp run beside the matmul that needs them.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="What states are kept in: traced (the --dtype), or master (float32 beside it, as Megatron).",
            rich_help_panel=_RUN,
        ),
    ] = "traced",
    optimizer_shards: Annotated[
        int,
        typer.Option(
            help="Ranks that share the optimizer's state and work (ZeRO-1).", min=1, rich_help_panel=_RUN
        ),
    ] = 1,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Terms to switch off: {', '.join(TERM_NAMES)}.", show_default="none", rich_help_panel=_RUN
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Over all pp x dp or fsdp x tp of --devices, and micro-batch sizes.",
            rich_help_panel=_SWEEP,
        ),
    ] = False,
    devices: Annotated[
        int | None, typer.Option(help="Of a sweep.", min=1, show_default="one node's", rich_help_panel=_SWEEP)
    ] = None,
    micro_batches: Annotated[
        str | None,
        typer.Option(
            help="Of a sweep: sequences per data-parallel rank at a time.",
            show_default="1,2,4,8",
            rich_help_panel=_SWEEP,
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            help="Rows of a sweep's table; all are in the JSON and on the page.",
            min=1,
            rich_help_panel=_SWEEP,
        ),
    ] = 20,
    program: Annotated[
        Path | None,
        typer.Option(
            help="Predict from a saved program instead of tracing; torch isn't needed.",
            show_default="none",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    save_program: Annotated[
        Path | None,
        typer.Option(
            help="File for the traced program, for --program.", show_default="none", rich_help_panel=_OUTPUT
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the page, the data, and the predicted step as a trace for ui.perfetto.dev.",
            show_default="none",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> int:
    """Predict time and memory of plans on a machine that you needn't have, term by term.

    One micro-batch of the real module under the real plan is traced on fake tensors; the machine's constants, each with its source, make
    times of it. Exit code 1 where a plan doesn't fit in the machine's memory.

    [dim]shardwise predict --dtype bfloat16[/]
    [dim]shardwise predict rowwise colwise routed --model llama3-70b --mesh fsdp=8,tp=8 --dtype bfloat16 --recompute full[/]
    [dim]shardwise predict --model gpt3-175b --mesh pp=8,dp=8,tp=8 --accumulation 16 --seq 2048 --dtype bfloat16 --out page[/]
    [dim]shardwise predict --sweep --devices 64 --model llama3-70b --batch 512 --dtype bfloat16 --recompute full[/]
    [dim]shardwise predict --save-program 8b.json; shardwise predict --program 8b.json --machine mine.toml[/]
    """
    check_dtypes(dtype, param_dtype, reduce_dtype)
    check_choice("--recompute", recompute, RECOMPUTE)
    check_choice("--precision", precision, tuple(Precision))
    if attention is not None:
        check_choice("--attention", attention, tuple(AttentionKernel))
    if matmul_dtype is not None:
        check_choice("--matmul-dtype", matmul_dtype, MATMUL_DTYPES)
    setup = Setup(
        mesh=None if mesh is None else Mesh.parse(mesh),
        micro_batches=accumulation,
        chunks=chunks,
        attention=None if attention is None else AttentionKernel(attention),
        recompute_attention=recompute == SELECTIVE,
        compiled=compiled,
        compiled_loss=compiled_loss,
        matmul_dtype=matmul_dtype,
        overlap_data=overlap_data,
        overlap_tensor=overlap_tensor,
        optimizer_shards=optimizer_shards,
        precision=Precision(precision),
        without=_terms(without or []),
    )
    if setup.mesh is not None:
        check_carried(setup.mesh, "predict", PREDICTED)
    traced_recompute = "none" if recompute == SELECTIVE else recompute
    from shardwise.predict.machines import load_machine

    found = load_machine(machine)
    console = Console(stderr=as_json)
    if sweep:
        _refuse(
            context, _NOT_SWEPT, "a sweep goes over it, or has no use for it. Leave it out beside --sweep"
        )
        task = SweepTask(
            model,
            "",
            sequence_parallel,
            MicroBatch(
                0,
                _part_of(seq, setup.context),
                dtype,
                param_dtype,
                reduce_dtype,
                traced_recompute,
                random_ids=random_ids,
            ),
            _sizes(micro_batches),
            batch,
            (),
            setup,
            found,
        )
        return _sweep(
            task,
            plans or [default_plan(model)],
            devices or found.devices_per_node,
            top,
            console,
            as_json=as_json,
            out=out,
        )
    _refuse(context, _OF_SWEEP, "it is a sweep's. Add --sweep, or leave it out")
    if program is not None:
        decided = (*_OF_PROGRAM, *(("recompute",) if traced_recompute != "none" else ()))
        _refuse(
            context,
            decided,
            "a saved program has its own. Leave it out beside --program, or trace without --program",
        )
        step = _saved_step(load_program(program), found, setup)
        return _deliver(found, [step], console, as_json=as_json, out=out)
    asked = _Asked(
        model,
        batch,
        seq,
        dtype,
        param_dtype,
        reduce_dtype,
        traced_recompute,
        random_ids,
        sequence_parallel,
        setup if setup.mesh is not None else replace(setup, mesh=Mesh.of({Role.CUTS_TENSORS: 8})),
    )
    check_precision(asked.settings, asked.mesh)
    chosen = plans or [default_plan(model)]
    if save_program is not None and len(chosen) > 1:
        raise OptionError(
            f"--save-program {shown(save_program)}: is one program's, and {len(chosen)} plans are given. Give one plan."
        )
    steps = _traced_steps(asked, chosen, found)
    if save_program is not None:
        write_program(steps[0].program, save_program)
    return _deliver(found, steps, console, as_json=as_json, out=out)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The step that all plans of one command share."""

    model: str
    batch: int | None
    seq: int
    dtype: str
    param_dtype: str | None
    reduce_dtype: str | None
    recompute: str
    random_ids: bool
    sequence_parallel: bool
    setup: Setup

    @property
    def mesh(self) -> Mesh:
        assert self.setup.mesh is not None
        return self.setup.mesh

    @property
    def settings(self) -> StepSettings:
        """Of the whole step."""
        parts = self.mesh.data_parallel * self.setup.micro_batches
        return StepSettings(
            self.batch or parts,
            self.seq,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            accumulation=self.setup.micro_batches,
            recompute=self.recompute,
        )

    def micro_batch(self) -> MicroBatch:
        """Raises OptionError for a batch or a sequence that can't be cut into equal parts."""
        parts = self.mesh.data_parallel * self.setup.micro_batches
        if self.settings.batch % parts:
            raise OptionError(
                f"--batch {self.settings.batch} can't be cut into {self.mesh.data_parallel} data-parallel parts of {self.setup.micro_batches} "
                f"micro-batches. Use a multiple of {parts}."
            )
        seq = _part_of(self.seq, self.setup.context)
        return MicroBatch(
            self.settings.batch // parts,
            seq,
            self.dtype,
            self.param_dtype,
            self.reduce_dtype,
            self.recompute,
            random_ids=self.random_ids,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A Program with what makes a whole step of it. label: the plan's, told apart from others of its name."""

    label: str
    program: "Program"
    setup: Setup
    settings: StepSettings


def _terms(given: Sequence[str]) -> tuple[Term, ...]:
    """`launch`, or several with commas between."""
    found = []
    for name in (part.strip() for each in given for part in each.split(",")):
        if name not in TERM_NAMES:
            raise OptionError(
                f'--without: unknown term "{shown(name)}".{suggest(name[:80], TERM_NAMES)} Allowed: {", ".join(TERM_NAMES)}.'
            )
        found.append(TERM_NAMES[name])
    return tuple(term for term in Term if term in found)


def _refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises OptionError for one of these options that the user gave."""
    shown_names = {str(parameter.name): str(parameter.opts[0]) for parameter in context.command.params}
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT" and context.params.get(name):
            raise OptionError(f"{shown_names[name]}: {why}.")


def _sizes(given: str | None) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4)."""
    if given is None:
        return MICRO_BATCHES
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and len(part) < 7 and int(part) for part in parts):
        raise OptionError(
            f'--micro-batches is "{shown(given)}". Write sizes with commas between, such as 1,2,4.'
        )
    return tuple(sorted({int(part) for part in parts}))


def _part_of(seq: int, context_ranks: int) -> int:
    """One context rank's tokens of a sequence."""
    if seq % context_ranks:
        raise OptionError(
            f"--seq {seq} can't be cut into {context_ranks} parts for cp={context_ranks}. Use a multiple of it."
        )
    return seq // context_ranks


def _sweep(
    task: SweepTask,
    plans: Sequence[str],
    devices: int,
    top: int,
    console: Console,
    *,
    as_json: bool,
    out: Path | None,
) -> int:
    from shardwise.cli.progress import ProgressLine
    from shardwise.report.common.deliver import deliver

    with ProgressLine() as progress:
        found = sweep_over(task, plans, devices, lambda done, total, text: progress(text, done, total))
    asked = {
        "model": task.model,
        "plans": list(plans),
        "devices": devices,
        "machine": found.machine.name,
        "setup": task.setup,
    }
    deliver(found, "json" if as_json else "terminal", console, out, settings=asked, most=top)
    return 0 if any(point.fits for point in found.points) else 1


def _saved_step(program: "Program", machine: "Machine", setup: Setup) -> Step:
    from shardwise.predict.check import check_setup

    whole = setup.mesh or Mesh(program.axes)
    check_setup(program, machine, setup)
    traced = program.settings
    small = Mesh(program.axes)
    batch = (
        traced.batch
        // (small.data_parallel * traced.accumulation)
        * whole.data_parallel
        * setup.micro_batches
    )
    settings = replace(
        traced, batch=max(1, batch), seq=traced.seq * setup.context, accumulation=setup.micro_batches
    )
    return Step(program.plan, program, setup, settings)


def _traced_steps(asked: _Asked, plans: Sequence[str], machine: "Machine") -> list[Step]:
    micro_batch = asked.micro_batch()
    from shardwise.predict.check import check_devices, check_setup

    check_devices(machine, asked.mesh)
    from shardwise.cli.progress import ProgressLine
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan

    with ProgressLine() as progress:
        source: ModelSource = find_model(asked.model)
        check_seq(asked.seq, source)
        loaded = [
            load_any_plan(name, sequence_parallel=asked.sequence_parallel, family=source.family)
            for name in plans
        ]
        steps: list[Step] = []
        for plan in loaded:
            program = trace_program(source, plan, asked.mesh, micro_batch, machine.device, progress)
            check_setup(program, machine, asked.setup)
            steps.append(Step(_label(program.plan, steps), program, asked.setup, asked.settings))
    return steps


def _label(plan: str, before: Sequence[Step]) -> str:
    known = {step.label for step in before}
    return (
        plan
        if plan not in known
        else next(label for number in count(2) if (label := f"{plan} #{number}") not in known)
    )


def _deliver(
    machine: "Machine", steps: Sequence[Step], console: Console, *, as_json: bool, out: Path | None
) -> int:
    from shardwise.report.common.deliver import deliver

    run = _predicted(machine, steps)
    first = run.predictions[0]
    asked = {
        "model": first.model,
        "plans": [prediction.plan for prediction in run.predictions],
        "mesh": str(Mesh(first.axes)),
        "machine": run.machine.name,
        "settings": run.settings,
        "setup": first.setup,
    }
    labels: dict[str, str] = {}

    def beside() -> dict[str, bytes]:
        made = {}
        for name, label, trace in _traces(machine, steps):
            made[name] = trace
            labels[name] = label
        return made

    how = "json" if as_json else "terminal"
    deliver(run, how, console, out, settings=asked, beside=beside)
    for name, label in labels.items():
        assert out is not None
        told = f"{shown(label)}, for ui.perfetto.dev: {out / name}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    return 0 if run.fits else 1


def _predicted(machine: "Machine", steps: Sequence[Step]) -> "PredictionRun":
    from shardwise.core.prediction_run import PredictionRun
    from shardwise.predict.contrast import differences, facts_of
    from shardwise.predict.predict import predict
    from shardwise.predict.timeline import launch_bound

    predictions: list[Prediction] = []
    for step in steps:
        prediction = predict(step.program, machine, step.setup)
        if not prediction.step_s > 0:
            raise OptionError("--without: nothing is left of the step. Switch fewer terms off.")
        predictions.append(replace(prediction, plan=step.label))
    waits = tuple(launch_bound(step.program, machine, step.setup) for step in steps)
    return PredictionRun(
        facts_of(machine), steps[0].settings, tuple(predictions), differences(predictions), waits
    )


def _traces(machine: "Machine", steps: Sequence[Step]) -> Iterator[tuple[str, str, bytes]]:
    """(file name, what it is, a trace for Perfetto) of each plan, and of its stages."""
    from shardwise.files.perfetto import perfetto_trace
    from shardwise.predict.timeline import pipeline_timelines, timeline_of

    for step, letter in zip(steps, _letters(), strict=False):
        inside = (step.program, machine, step.setup)
        yield f"timeline-{letter}.json.gz", step.label, perfetto_trace([timeline_of(*inside)])
        passes = pipeline_timelines(*inside)
        if passes:
            yield f"stages-{letter}.json.gz", f"{step.label}'s stages", perfetto_trace(passes)


def _letters() -> Iterator[str]:
    """a, b, ... for files of several plans, whose names needn't be file names."""
    return (f"{'' if number < 26 else number // 26}{chr(ord('a') + number % 26)}" for number in count())
