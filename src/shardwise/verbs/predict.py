"""predict: plans on a machine -> PredictionRun: time and memory, term by term, of a traced or a saved
micro-batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from shardwise.core.allocator import allocator_settings
from shardwise.core.beside import PredictedStep
from shardwise.core.case import Case, StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.machine import Machine
from shardwise.core.mesh import PREDICTED, Mesh, check_carried
from shardwise.core.option import Option, check_options
from shardwise.core.pipeline import Schedule, counts_of
from shardwise.core.plan import suggest
from shardwise.core.prediction import AttentionKernel, Filling, Precision, Scaling, Setup, Term
from shardwise.core.prediction_run import PredictionRun
from shardwise.core.program import Program
from shardwise.core.shown import shown
from shardwise.core.timeline import Timeline
from shardwise.verbs.checks import check_fsdp, check_seq, default_plan
from shardwise.verbs.dealing import with_dealt_layers
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from shardwise.predict.layout import Layout

MACHINE = "h100-sxm-80gb"
SEQ = 8192
HOW = "How it runs"
TERM_NAMES = {term.name.lower(): term for term in Term}


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """What is assumed of the run, beside the case: see core/prediction.py's Setup. recompute_attention: the
    unfused attention between its projections runs again in the backward."""

    attention: Annotated[
        str | None,
        Option(
            f"{', '.join(AttentionKernel)}.",
            HOW,
            choices=tuple(AttentionKernel),
            shown="as the traced op says",
        ),
    ] = None
    recompute_attention: bool = False
    compiled: Annotated[
        bool, Option("Kernels between matmuls fused by a compiler.", HOW, flag="--compiled/--eager")
    ] = False
    compiled_loss: Annotated[
        bool,
        Option(
            "The loss is fused too: no copy of the logits in float32.",
            HOW,
            flag="--compiled-loss/--eager-loss",
        ),
    ] = False
    matmul_dtype: Annotated[
        str | None,
        Option("What the layers' linears multiply in.", HOW, choices=("float8",), shown="the --dtype"),
    ] = None
    scaling: Annotated[
        str,
        Option(
            "By what float8 numbers are scaled: delayed (Transformer Engine), tensorwise, rowwise (torchao).",
            HOW,
            choices=tuple(Scaling),
        ),
    ] = "tensorwise"
    overlap_data: Annotated[bool, Option("Gradients over dp are reduced beside the backward.", HOW)] = False
    bucket_mib: Annotated[
        float | None,
        Option(
            "Size of the buckets in which --overlap-data reduces gradients, in MiB.",
            HOW,
            0.001,
            shown="DDP's 1, then 25; with --precision master Megatron's",
        ),
    ] = None
    overlap_tensor: Annotated[
        bool, Option("Collectives over tp run beside the matmul that needs them.", HOW)
    ] = False
    precision: Annotated[
        str,
        Option(
            "What states are kept in: traced (the --dtype), or master (float32 beside it, as Megatron).",
            HOW,
            choices=tuple(Precision),
        ),
    ] = "traced"
    sums_float32: Annotated[
        bool, Option("Gradients in half precision are summed over replicas in float32.", HOW)
    ] = False
    optimizer_shards: Annotated[
        int, Option("Ranks that share the optimizer's state and work (ZeRO-1).", HOW, 1)
    ] = 1
    spread_s: Annotated[
        float | None,
        Option(
            "How far apart ranks come to a collective: the standard deviation, in seconds, of one second's "
            "work. 0: all at once.",
            HOW,
            0,
            key="spread",
            shown="as the machine says",
        ),
    ] = None
    allocator: Annotated[
        str,
        Option(
            "PYTORCH_ALLOC_CONF of the run, such as expandable_segments:True.", HOW, shown="PyTorch's own"
        ),
    ] = ""
    filled: Annotated[
        str,
        Option(
            "How parameters get their first values: shards (each rank its own), or whole (one whole "
            "parameter after the other, as Shardwise's ranks do it).",
            HOW,
            choices=tuple(Filling),
        ),
    ] = "shards"
    without: Annotated[
        tuple[str, ...], Option(f"Terms to switch off: {', '.join(TERM_NAMES)}.", HOW, shown="none")
    ] = ()

    def __post_init__(self) -> None:
        check_options(self)
        allocator_settings(self.allocator)
        _terms(self.without)

    def setup(self, mesh: Mesh | None, step: StepSettings) -> Setup:
        """step: its micro-batches and its pipeline's schedule count."""
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(PredictOptions)}
        own |= {"precision": Precision(self.precision), "scaling": Scaling(self.scaling)}
        own |= {"without": _terms(self.without)}
        own |= {"allocator": allocator_settings(self.allocator), "filled": Filling(self.filled)}
        if self.attention is not None:
            own["attention"] = AttentionKernel(self.attention)
        schedule = Schedule(step.schedule) if step.schedule is not None else None
        own |= {"chunks": step.chunks, "schedule": schedule, "layers": counts_of(step.stages)}
        return Setup(mesh, step.accumulation, **own)


@dataclass(frozen=True, slots=True)
class Step:
    """A plan's step, laid out. label: the plan's, told apart from others of its name."""

    label: str
    layout: "Layout"
    settings: StepSettings


@dataclass(frozen=True, slots=True)
class Predicted:
    """answer: of all steps on the machine."""

    answer: PredictionRun
    machine: Machine
    steps: tuple[Step, ...]

    def line_by_line(self) -> Iterable[tuple[str, PredictedStep]]:
        """(name, the step) of each plan: what diff lays beside a profile."""
        from shardwise.predict.step import step_of

        for number, (step, made) in enumerate(zip(self.steps, self.answer.predictions, strict=True)):
            yield f"step-{_letter(number)}", step_of(step.layout, made, step.settings)

    def timelines(self) -> Iterable[tuple[str, str, Sequence[Timeline]]]:
        """(name, what it is, ranks) of each plan's step, and of its pipeline's stages."""
        from shardwise.predict.timeline import pipeline_timelines, timeline_of

        for number, step in enumerate(self.steps):
            letter = _letter(number)
            yield f"timeline-{letter}", step.label, [timeline_of(step.layout)]
            passes = pipeline_timelines(step.layout)
            if passes:
                yield f"stages-{letter}", f"{step.label}'s stages", passes


def predict(case: Case, options: PredictOptions | None = None, progress: Progress = silent) -> Predicted:
    """Each of the case's plans, traced as one micro-batch on fake tensors. machine: h100-sxm-80gb by default.
    batch by default: a sequence per data-parallel rank and micro-batch; seq: 8192. Raises InputError for
    names that aren't known, and for what doesn't fit together."""
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan
    from shardwise.predict.check import check_devices, check_setup
    from shardwise.predict.layout import lay_out
    from shardwise.predict.machines import load_machine
    from shardwise.predict.traced import micro_batch
    from shardwise.verbs.programs import trace_program

    options, machine = options or PredictOptions(), load_machine(case.machine or MACHINE)
    check_carried(case.mesh, "predict", PREDICTED)
    check_fsdp(case)
    batch = case.step.batch or case.mesh.data_parallel * case.step.accumulation
    settings = replace(case.step, batch=batch, seq=case.step.seq or SEQ)
    case.step.pipeline(case.mesh).check(settings.accumulation)
    traced = micro_batch(settings, case.mesh)
    check_devices(machine, case.mesh)
    source = find_model(case.model)
    check_seq(settings.seq, source)
    plans = [
        load_any_plan(
            name,
            sequence_parallel=case.sequence_parallel,
            family=source.family,
            context_attention=case.context_attention,
        )
        for name in case.plans or (default_plan(source),)
    ]
    case = replace(case, step=settings)
    case = with_dealt_layers(case, source, plans[0], case.machine or MACHINE, progress)
    setup = options.setup(case.mesh, case.step)
    steps: list[Step] = []
    for plan in plans:
        program = trace_program(source, plan, case.mesh, traced, case.text, machine.device, progress)
        check_setup(program, machine, setup)
        steps.append(Step(_label(program.plan, steps), lay_out(program, machine, setup), settings))
    return _predicted(machine, steps)


def predict_program(
    program: Program,
    machine: str = MACHINE,
    options: PredictOptions | None = None,
    mesh: Mesh | None = None,
    micro_batches: int = 1,
    step: StepSettings | None = None,
) -> Predicted:
    """A saved Program, which needs no torch. mesh: None for the Program's own."""
    from shardwise.predict.check import check_setup
    from shardwise.predict.groups import joining_context
    from shardwise.predict.layout import lay_out
    from shardwise.predict.machines import load_machine

    found, small, traced = load_machine(machine), Mesh(program.axes), program.settings
    if mesh is not None:
        check_carried(mesh, "predict", PREDICTED)
    setup = (options or PredictOptions()).setup(
        mesh, replace(step or StepSettings(), accumulation=micro_batches)
    )
    check_setup(program, found, setup)
    whole = setup.mesh or small
    share = traced.batch // (small.data_parallel * traced.accumulation)
    settings = replace(
        traced,
        batch=max(1, share * whole.data_parallel * setup.micro_batches),
        seq=traced.seq * joining_context(program, setup),
        accumulation=setup.micro_batches,
    )
    return _predicted(found, [Step(program.plan, lay_out(program, found, setup), settings)])


def _predicted(machine: Machine, steps: Sequence[Step]) -> Predicted:
    from shardwise.predict.contrast import differences, facts_of
    from shardwise.predict.predict import prediction_of
    from shardwise.predict.timeline import launch_bound

    predictions = []
    for step in steps:
        prediction = prediction_of(step.layout)
        if not prediction.step_s > 0:
            raise OptionError("--without: nothing is left of the step. Switch fewer terms off.")
        predictions.append(replace(prediction, plan=step.label))
    waits = tuple(launch_bound(step.layout) for step in steps)
    apart = differences(predictions)
    run = PredictionRun(facts_of(machine), steps[0].settings, tuple(predictions), apart, waits)
    return Predicted(run, machine, tuple(steps))


def _terms(given: Sequence[str]) -> tuple[Term, ...]:
    """`launch`, or several with commas between."""
    names = [part.strip() for each in given for part in each.split(",")]
    for name in names:
        if name not in TERM_NAMES:
            raise OptionError(
                f'--without: unknown term "{shown(name)}".{suggest(name[:80], TERM_NAMES)} '
                f"Allowed: {', '.join(TERM_NAMES)}."
            )
    return tuple(term for name, term in TERM_NAMES.items() if name in names)


def _letter(number: int) -> str:
    return f"{number // 26 or ''}{chr(ord('a') + number % 26)}"


def _label(plan: str, before: Sequence[Step]) -> str:
    """plan, "plan #2", ..."""
    known = {step.label for step in before}
    label, number = plan, 2
    while label in known:
        label, number = f"{plan} #{number}", number + 1
    return label
