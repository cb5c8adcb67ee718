"""compare: plans -> Comparison: each proved against the unsharded model, then timed in rounds beside the
others."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from shardwise.core.case import Case
from shardwise.core.difference import RunProfile, StepPicture
from shardwise.core.errors import OptionError
from shardwise.core.finding import Finding
from shardwise.core.measurement import Comparison, StepProfile
from shardwise.core.mesh import RUN, check_carried
from shardwise.core.option import Option, check_options
from shardwise.core.verification import Agreement
from shardwise.files.run_folder import RunFolder
from shardwise.verbs.checks import check_fsdp, check_recompute, check_router_decides, check_seq, check_stages
from shardwise.verbs.compare_beside import Laid, Side, laid, predicted_sides
from shardwise.verbs.compare_checks import check_depth, check_fit, check_module, default_plans
from shardwise.verbs.dealing import with_dealt_layers
from shardwise.verbs.predict import MACHINE
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from torch import nn

    from shardwise.measure.record import RankReport
    from shardwise.models.source import ModelSource
    from shardwise.text.stream import TokenStream
    from shardwise.verbs.compare_ranks import CompareJob

TRACES = "traces"
BATCH, SEQ = 4, 256
PANEL = "Measuring"


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What only compare knows."""

    rounds: Annotated[int, Option("Timed steps of every plan, interleaved.", PANEL, 1)] = 20
    warmup: Annotated[
        int, Option("Steps of every plan before the clock starts, after a first one.", PANEL, 0)
    ] = 1
    module: Annotated[
        str | None, Option("Measure this module alone, forward and backward, such as tok_embeddings.", PANEL)
    ] = None
    check: Annotated[
        bool, Option("First compare loss and every gradient with the unsharded model.", PANEL)
    ] = True
    repeat: Annotated[bool, Option("Run the first plan twice, to show the noise.", PANEL)] = True
    profile: Annotated[
        bool, Option("After the rounds, record some steps of each plan and say where their time went.", PANEL)
    ] = False
    profile_steps: Annotated[int, Option("Steps that --profile records of each plan.", PANEL, 1)] = 3
    timeout: Annotated[
        float, Option("Seconds without any sign of life after which the run is given up.", PANEL, 1)
    ] = 600.0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class Compared:
    """answer: None on torchrun's other ranks. folder: where the events went. runs, pictures: of the
    profiles. laid: predictions beside them, where a machine was given."""

    answer: Comparison | None
    folder: RunFolder | None = None
    runs: tuple[RunProfile, ...] = ()
    pictures: tuple[tuple[StepPicture, ...], ...] = ()
    laid: tuple[Laid, ...] = ()


def compare(
    case: Case,
    options: CompareOptions | None = None,
    progress: Progress = silent,
    *,
    open_folder: Callable[[], RunFolder] | None = None,
) -> Compared:
    """Starts the mesh's ranks on this machine, or uses torchrun's. Everything that needs no ranks is checked
    first: InputError for names, sizes, and what can't fit. An answer without measurements says what is wrong.

    open_folder: called once all is checked; the folder gets settings.json and events.jsonl as they come, and
    profiles."""
    from shardwise.launch import is_main

    options = options or CompareOptions()
    run = _Run.checked(case, options)
    if not is_main():
        run.launch(None, lambda _: None)
        return Compared(None)
    if options.profile and open_folder is None:
        raise OptionError("--profile writes traces. Give a folder for them.")
    sides = run.predicted(progress) if options.profile and case.machine is not None else ()
    started = datetime.now(UTC)
    progress("reading text")
    stream = run.tokens(progress)
    folder = open_folder() if open_folder is not None else None
    with folder or nullcontext():
        if folder is not None and options.profile:
            run = run.with_traces(folder.path.resolve() / TRACES)
        reports = run.measured(stream, folder, progress)
        comparison = run.comparison(reports, stream, started)
        if not options.profile or not comparison.measurements:
            return Compared(comparison, folder)
        runs, pictures, laid_beside = run.profiled(sides, progress)
    both = laid_beside or (None,) * len(runs)
    profiles = tuple(run.step_profile(*each) for each in zip(runs, both, strict=True))
    return Compared(replace(comparison, profiles=profiles), folder, runs, pictures, laid_beside)


@dataclass(frozen=True, slots=True)
class _Run:
    """What was asked, checked as far as that goes without ranks. model: whole, on the meta device."""

    case: Case
    options: CompareOptions
    source: "ModelSource"
    model: "nn.Module"
    device_type: str
    job: "CompareJob"

    @classmethod
    def checked(cls, case: Case, options: CompareOptions) -> "_Run":
        import torch

        from shardwise.launch.environment import device_type
        from shardwise.models.source import embedding_of, find_model
        from shardwise.parallel.any_plan import text_of
        from shardwise.parallel.plans import load_plans
        from shardwise.verbs.compare_ranks import CompareJob

        source, mesh = find_model(case.model), case.mesh
        check_carried(mesh, "compare", RUN)
        check_fsdp(case)
        check_router_decides(case)
        step = replace(case.step, batch=case.step.batch or BATCH, seq=case.step.seq or SEQ)
        case = replace(case, step=step)
        check_seq(step.seq, source)
        labelled = load_plans(
            case.plans or default_plans(source),
            sequence_parallel=case.sequence_parallel,
            context_attention=case.context_attention,
            family=source.family,
        )
        case = with_dealt_layers(case, source, labelled[0][1], case.machine or MACHINE, silent)
        step = case.step
        check_stages(case, source)
        check_recompute(case, source)
        model = source.build(dtype=getattr(torch, step.dtype))
        device = device_type(case.device, mesh.world_size)
        check_fit(source, model, [plan for _, plan in labelled], case, device, options.repeat)
        if options.module is not None:
            check_module(model, source.name, options.module, mesh)
        job = CompareJob(
            model=case.model,
            mesh=str(mesh),
            plans=tuple(text_of(plan) for _, plan in labelled),
            labels=tuple(label for label, _ in labelled),
            settings=step,
            rounds=options.rounds,
            warmup=options.warmup,
            module=options.module or (None if mesh.fsdp * mesh.stages > 1 else embedding_of(model)),
            module_only=options.module is not None,
            check=options.check,
            check_layers=check_depth(source, model, mesh, device) if options.check else 0,
            repeat_first=options.repeat,
            profile_steps=options.profile_steps if options.profile else 0,
        )
        return cls(case, options, source, model, device, job)

    def with_traces(self, traces: Path) -> "_Run":
        return replace(self, job=replace(self.job, traces=str(traces)))

    def tokens(self, progress: Progress) -> "TokenStream":
        from shardwise.models.source import vocab_size_of
        from shardwise.text.batches import Batches
        from shardwise.text.traced_ids import stream_of

        step = self.case.step
        stream = stream_of(self.case.text, vocab_size_of(self.model), step.seed, progress)
        Batches(stream, step.batch, step.seq)  # too short a text is found here, not on the ranks
        return stream

    def measured(
        self, stream: "TokenStream", folder: RunFolder | None, progress: Progress
    ) -> "list[RankReport]":
        """To disk first: nothing that was measured is lost."""
        import msgspec

        from shardwise.verbs.compare_ranks import Progress as Told

        if folder is not None:
            asked = replace(self.job, traces="")
            folder.write("settings.json", msgspec.json.format(msgspec.json.encode(asked), indent=2))

        def on_event(event: bytes) -> None:
            if folder is not None:
                folder.append_event(event)
            told = msgspec.json.decode(event, type=Told)
            progress(told.text, told.done, told.total)

        progress(f"starting {self.case.mesh.world_size} ranks")
        return self.launch(stream, on_event)

    def launch(self, stream: "TokenStream | None", on_event: Callable[[bytes], None]) -> "list[RankReport]":
        import msgspec

        from shardwise.launch import run_ranks
        from shardwise.launch.environment import threads_per_rank
        from shardwise.measure.record import RankReport
        from shardwise.verbs.compare_ranks import pack

        results = run_ranks(
            "shardwise.verbs.compare_ranks:run",
            pack(self.job, stream),
            world_size=self.case.mesh.world_size,
            device_type=self.device_type,
            timeout_s=self.options.timeout,
            on_event=on_event,
            threads_per_rank=threads_per_rank(self.case.mesh.world_size),
        )
        return [msgspec.msgpack.decode(result, type=RankReport) for result in results]

    def comparison(self, reports: "list[RankReport]", stream: "TokenStream", started: datetime) -> Comparison:
        from shardwise.launch.environment import describe
        from shardwise.measure.record import merge
        from shardwise.measure.verdict import noise_of, notes, standings, verdict

        job = self.job
        environment = describe(
            shlex.join(["shardwise", *sys.argv[1:]]),
            started.isoformat(timespec="seconds"),
            device_type=self.device_type,
            world_size=self.case.mesh.world_size,
            variables=reports[0].variables,
        )
        measurements = merge(reports)
        comparison = Comparison(
            model=self.source.name,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            mesh=job.mesh,
            settings=job.settings,
            module=job.module if job.module_only else None,
            rounds=job.rounds,
            warmup=1 + job.warmup,
            environment=environment,
            text=stream.summary,
            measurements=measurements,
            standings=(),
            noise=None,
            verdict=tuple(_wrong(reports[0])),
            notes=(*notes(measurements), *reports[0].notes, *self._notes(stream)),
        )
        if not measurements:
            return comparison
        standing = standings(measurements, None if job.module_only else job.settings.tokens)
        what = f"{job.module} forward and backward" if job.module_only else "step"
        lines = verdict(measurements, standing, what=what, backend=environment.backend)
        noise = noise_of(measurements, standing)
        return replace(comparison, standings=standing, noise=noise, verdict=lines)

    def _notes(self, stream: "TokenStream") -> Iterator[str]:
        """What a reader must know of the model, and of its ids."""
        from shardwise.models.init import MOST_OWN, draws_its_own
        from shardwise.models.layers import find_layers
        from shardwise.models.source import vocab_size_of
        from shardwise.text.reading import why_no_text

        yield from self.source.notes
        layers, checked = find_layers(self.model), self.job.check_layers
        if layers is not None and 0 < checked < layers.count:
            yield (
                f"The check against the unsharded model ran on {checked} of {layers.count} layers at full "
                "width: the whole model unsharded would not fit here."
            )
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if self.source.initialises and not draws_its_own(self.source, parameters):
            yield (
                "Initial weights are random ones by the parameters' names: the model's own initialisation "
                f"would need it whole on every rank, which is done up to {MOST_OWN / 1e6:.0f} M parameters."
            )
        if (why := why_no_text(self.case.text, vocab_size_of(self.model))) is not None:
            yield why
        else:
            yield from _text_notes(stream)

    def predicted(self, progress: Progress) -> tuple[Side, ...]:
        """Each plan's step, before any rank starts."""
        if self.options.module is not None:
            raise OptionError("--machine predicts whole steps, and --module is one alone. Leave one out.")
        plans = self.case.plans or default_plans(self.source)
        return predicted_sides(self.case, plans, self.job.labels, self.device_type, progress)

    def profiled(
        self, sides: tuple[Side, ...], progress: Progress
    ) -> tuple[tuple[RunProfile, ...], tuple[tuple[StepPicture, ...], ...], tuple[Laid, ...]]:
        """Where each plan's step went; beside its prediction, where there is one. Raises TraceError where a
        trace can't be read."""
        from shardwise.profiles.collectives import share
        from shardwise.profiles.picture import picture
        from shardwise.profiles.ranks import read_ranks, trace_files
        from shardwise.profiles.run import profile_run

        runs: list[RunProfile] = []
        pictures: list[tuple[StepPicture, ...]] = []
        beside: list[Laid] = []
        for number, label in enumerate(self.job.labels):
            progress(f"reading the profiles of {label}")
            timelines, sharing = share(read_ranks(trace_files(self._traces_of(label))))
            runs.append(profile_run(label, timelines, sharing))
            drawn = picture(label, timelines)
            pictures.append((drawn,) if drawn is not None else ())
            if sides:
                beside.append(laid(sides[number], runs[-1], timelines, pictures[-1]))
        return tuple(runs), tuple(pictures), tuple(beside)

    def step_profile(self, run: RunProfile, beside: Laid | None) -> StepProfile:
        from shardwise.profiles.diff import run_words

        return StepProfile(
            label=run.label,
            steps=len({step.step for step in run.steps}),
            parts=run.parts,
            communication_ns=run.communication_ns,
            overlap_ns=run.overlap_ns,
            words=run_words(run),
            traces=str(self._traces_of(run.label)),
            terms=beside.both.terms if beside is not None else (),
            terms_words=beside.both.verdict if beside is not None else (),
        )

    def _traces_of(self, label: str) -> Path:
        from shardwise.verbs.compare_ranks import folder_name

        return Path(self.job.traces) / folder_name(label)


def _wrong(report: "RankReport") -> Iterator[str]:
    """Every reason why the answer is no."""
    for finding in report.findings:
        yield _sentence("all plans", finding, None)
    for agreement in report.agreements:
        for finding in agreement.findings:
            yield _sentence(agreement.plan, finding, agreement)


def _sentence(plan: str, finding: Finding, agreement: Agreement | None) -> str:
    numbers = []
    if finding.relative_error is not None:
        numbers.append(f"relative error {finding.relative_error:.3g}")
        if finding.ratio is not None:
            numbers.append(f"ratio {finding.ratio:.6g}")
        if agreement is not None:
            numbers.append(f"allowed {agreement.tolerance:.0e}")
    rule = f", rule {finding.rule}" if finding.rule else ""
    size = f" ({', '.join(numbers)})" if numbers else ""
    advice = f" {finding.advice}" if finding.advice else ""
    return f"{plan}: {finding.subject}{rule}: {finding.reason}{size}.{advice} Nothing was timed."


def _text_notes(stream: "TokenStream") -> Iterator[str]:
    highest, vocab_size = int(stream.ids.max()), stream.summary.vocab_size
    if highest < 0.9 * vocab_size:
        yield (
            f"The text's ids end at {highest:,} of {vocab_size:,}: the tokenizer found no more pairs to "
            "merge. The "
            "upper part of the table is never looked up, which concentrates rowwise and contiguous routed "
            "look-ups "
            "on the first ranks."
        )
