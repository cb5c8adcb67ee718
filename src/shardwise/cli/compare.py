"""`shardwise compare`: runs sharding plans on real ranks and says which is better, and by how much."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from shardwise.cli.config import read_config
from shardwise.cli.options import (
    DTYPES,
    RECOMPUTE,
    STEP,
    ParamDtype,
    Recompute,
    ReduceDtype,
    check_batch,
    check_choice,
    check_precision,
    check_seq,
)
from shardwise.cli.profiled import profiled_plans
from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.finding import Finding
from shardwise.core.measurement import Comparison, StepProfile
from shardwise.core.mesh import RUN, Mesh, check_carried
from shardwise.core.plan import Plan, suggest
from shardwise.core.verification import Agreement

if TYPE_CHECKING:
    from shardwise.cli.progress import ProgressLine
    from shardwise.files.run_folder import RunFolder
    from shardwise.measure.record import RankReport
    from shardwise.models.specs import ModelSpec
    from shardwise.text.stream import TokenStream
    from shardwise.verbs.compare_ranks import CompareJob

TRACES = "traces"
DEFAULT_PLANS = ["rowwise", "colwise", "routed", "rowwise@dtensor", "colwise@dtensor"]
_MODEL, _RUN, _OUTPUT = "Model and mesh", "Measuring", "Output"


def compare(
    context: typer.Context,
    plans: Annotated[
        list[str] | None,
        typer.Argument(
            help="Built-in plans or .toml files; the first is what the others are held against.",
            show_default=f"{' '.join(DEFAULT_PLANS)}; without @dtensor for a model with a tied head",
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
    model: Annotated[
        str, typer.Option(help="A model of `shardwise models`.", rich_help_panel=_MODEL)
    ] = "llama3-debug",
    mesh: Annotated[
        str,
        typer.Option(
            help="Axes of ranks: tp, with dp or fsdp before it, such as fsdp=2,tp=2.", rich_help_panel=_MODEL
        ),
    ] = "tp=2",
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu or cuda; auto takes GPUs where there are enough.", rich_help_panel=_MODEL
        ),
    ] = "auto",
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Activations cut along the sequence between blocks.",
            rich_help_panel=_MODEL,
        ),
    ] = True,
    batch: Annotated[
        int, typer.Option(help="Sequences per optimizer step over all ranks.", min=1, rich_help_panel=STEP)
    ] = 4,
    seq: Annotated[int, typer.Option(help="Tokens per sequence.", min=1, rich_help_panel=STEP)] = 256,
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
    recompute: Recompute = "none",
    compile_layers: Annotated[
        bool,
        typer.Option(
            "--compile", help="torch.compile every layer: not offered yet, and refused.", rich_help_panel=STEP
        ),
    ] = False,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=STEP)] = 3e-4,
    max_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this global norm.", rich_help_panel=STEP)
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Of the initial weights and of random ids.", min=0, rich_help_panel=STEP)
    ] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your text files or folders; by default Python's own documentation.", rich_help_panel=STEP
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Your tokenizer.json; by default one is trained on the text.", rich_help_panel=STEP
        ),
    ] = None,
    random_ids: Annotated[
        bool, typer.Option("--random-ids", help="Uniform random ids instead of text.", rich_help_panel=STEP)
    ] = False,
    rounds: Annotated[
        int, typer.Option(help="Timed steps of every plan, interleaved.", min=1, rich_help_panel=_RUN)
    ] = 20,
    warmup: Annotated[
        int,
        typer.Option(
            help="Steps of every plan before the clock starts, after a first one.",
            min=0,
            rich_help_panel=_RUN,
        ),
    ] = 1,
    module: Annotated[
        str | None,
        typer.Option(
            help="Measure this module alone, forward and backward, such as tok_embeddings.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="First compare loss and every gradient with the unsharded model.",
            rich_help_panel=_RUN,
        ),
    ] = True,
    repeat: Annotated[
        bool,
        typer.Option(
            "--repeat/--no-repeat", help="Run the first plan twice, to show the noise.", rich_help_panel=_RUN
        ),
    ] = True,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="After the rounds, record some steps of each plan and say where their time went.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    profile_steps: Annotated[
        int, typer.Option(help="Steps that --profile records of each plan.", min=1, rich_help_panel=_RUN)
    ] = 3,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without any sign of life after which the run is given up.",
            min=1.0,
            rich_help_panel=_RUN,
        ),
    ] = 600.0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for HTML and data.", show_default="runs/compare-TIME", rich_help_panel=_OUTPUT
        ),
    ] = None,
) -> int:
    """Run sharding plans on real ranks and say which is better, and by how much.

    Every plan is checked first: its loss and every gradient must equal the unsharded model's. Then whole training steps are timed in
    interleaved rounds. The first plan runs twice, so the noise is seen.

    [dim]shardwise compare[/]
    [dim]shardwise compare rowwise colwise --mesh tp=4 --seq 1024 --rounds 20[/]
    [dim]shardwise compare rowwise colwise routed --module tok_embeddings[/]
    [dim]shardwise compare rowwise routed --profile[/]
    [dim]shardwise compare rowwise mine.toml --text notes/ --tokenizer tokenizer.json --json[/]
    [dim]torchrun --nproc-per-node 8 -m shardwise compare --config llama3_8b_tp8[/]
    """
    from shardwise.launch import is_main

    settings = StepSettings(
        batch=batch,
        seq=seq,
        dtype=dtype,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        accumulation=accumulation,
        recompute=recompute,
        compiled=compile_layers,
        learning_rate=learning_rate,
        max_norm=max_norm,
        seed=seed,
    )
    request = _Request.validated(
        plans=plans or [],
        model=model,
        mesh=Mesh.parse(mesh),
        device=device,
        sequence_parallel=sequence_parallel,
        settings=settings,
        rounds=rounds,
        warmup=warmup,
        module=module,
        check=check,
        repeat=repeat,
        profile_steps=profile_steps if profile else 0,
    )
    speaks = is_main()
    console = Console(stderr=as_json, quiet=not speaks)
    return _Run(request, timeout, console, as_json=as_json, speaks=speaks).run(
        out, text or [], tokenizer, random_ids
    )


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked, checked as far as that goes without ranks."""

    spec: "ModelSpec"
    mesh: Mesh
    device_type: str
    job: "CompareJob"

    @classmethod
    def validated(
        cls,
        *,
        plans: list[str],
        model: str,
        mesh: Mesh,
        device: str,
        sequence_parallel: bool,
        settings: StepSettings,
        rounds: int,
        warmup: int,
        module: str | None,
        check: bool,
        repeat: bool,
        profile_steps: int,
    ) -> "_Request":
        from shardwise.models.specs import get_spec
        from shardwise.parallel.plans import load_plans
        from shardwise.verbs.compare_ranks import CompareJob

        spec = get_spec(model)
        check_carried(mesh, "compare", RUN)
        check_precision(settings, mesh)
        check_choice("--recompute", settings.recompute, RECOMPUTE)
        check_choice("--device", device, ("auto", "cpu", "cuda"))
        # PyTorch's own styles would untie a head
        defaults = [name for name in DEFAULT_PLANS if not (spec.config.tied and name.endswith("@dtensor"))]
        labelled = load_plans(plans or defaults, sequence_parallel=sequence_parallel, family=spec.family)
        _check_positive("--learning-rate", settings.learning_rate)
        _check_positive("--max-norm", settings.max_norm)
        check_batch(settings, mesh)
        check_seq(settings.seq, spec)
        _check_compile(settings, [plan for _, plan in labelled])
        device_type = _device_type(device, mesh)
        _check_fit(spec, [plan for _, plan in labelled], mesh, settings, device_type, repeat)
        if module is not None:
            _check_module(spec, module, mesh)
        job = CompareJob(
            model=spec.name,
            mesh=str(mesh),
            plans=tuple(plan.to_toml() for _, plan in labelled),
            labels=tuple(label for label, _ in labelled),
            settings=settings,
            rounds=rounds,
            warmup=warmup,
            module=module or (None if mesh.fsdp > 1 else "tok_embeddings"),
            module_only=module is not None,
            check_layers=_check_layers(spec, mesh, device_type) if check else 0,
            repeat_first=repeat,
            profile_steps=profile_steps,
        )
        return cls(spec, mesh, device_type, job)


@dataclass(slots=True)
class _Run:
    request: _Request
    timeout_s: float
    console: Console
    as_json: bool
    speaks: bool

    def run(self, out: Path | None, files: list[Path], tokenizer: Path | None, random_ids: bool) -> int:
        """The whole command after the checks; returns the exit code."""
        from shardwise.cli.progress import ProgressLine
        from shardwise.files.run_folder import RunFolder

        started = datetime.now(UTC)
        if not self.speaks:
            self._launch(None, lambda _: None, None)
            return 0
        with ProgressLine() as progress:
            progress("reading text")
            stream = self._tokens(files, tokenizer, random_ids, progress)
            with RunFolder(out, "compare", started) as folder:
                folder.write(
                    "settings.json", msgspec.json.format(msgspec.json.encode(self.request.job), indent=2)
                )
                progress(f"starting {self.request.mesh.world_size} ranks")
                traces = folder.path.resolve() / TRACES if self.request.job.profile_steps else None
                reports = self._launch(stream, partial(_on_event, folder, progress), traces)
                comparison = self._comparison(reports, stream, started)
                profiles: tuple[StepProfile, ...] = ()
                pages: dict[str, str] = {}
                if traces is not None and comparison.measurements:
                    profiles, pages = profiled_plans(self.request.job.labels, traces, progress)
        return self._deliver(replace(comparison, profiles=profiles), reports[0], folder, pages)

    def _tokens(
        self, files: list[Path], tokenizer: Path | None, random_ids: bool, say: Callable[[str], None]
    ) -> "TokenStream":
        from shardwise.text.batches import Batches
        from shardwise.text.stream import load_tokens

        settings = self.request.job.settings
        stream = load_tokens(
            vocab_size=self.request.spec.vocab_size,
            files=files,
            tokenizer=tokenizer,
            random_ids=random_ids,
            seed=settings.seed,
            progress=say,
        )
        Batches(stream, settings.batch, settings.seq)  # too short a text is found here, not on the ranks
        return stream

    def _launch(
        self, stream: "TokenStream | None", on_event: Callable[[bytes], None], traces: Path | None
    ) -> "list[RankReport]":
        from shardwise.launch import run_ranks
        from shardwise.measure.record import RankReport
        from shardwise.verbs.compare_ranks import pack

        results = run_ranks(
            "shardwise.verbs.compare_ranks:run",
            pack(replace(self.request.job, traces=str(traces or "")), stream),
            world_size=self.request.mesh.world_size,
            device_type=self.request.device_type,
            timeout_s=self.timeout_s,
            on_event=on_event,
            threads_per_rank=_threads(self.request),
        )
        return [msgspec.msgpack.decode(result, type=RankReport) for result in results]

    def _comparison(
        self, reports: "list[RankReport]", stream: "TokenStream", started: datetime
    ) -> Comparison:
        from shardwise.launch.context import backend_of
        from shardwise.launch.environment import describe
        from shardwise.measure.record import merge
        from shardwise.measure.verdict import noise_of, notes, standings, verdict

        job = self.request.job
        backend = backend_of(self.request.device_type)
        measurements = merge(reports)
        findings = _findings(reports[0])
        found = (
            standings(measurements, None if job.module_only else job.settings.tokens) if measurements else ()
        )
        what = f"{job.module} forward and backward" if job.module_only else "step"
        lines = (
            verdict(measurements, found, what=what, backend=backend)
            if measurements
            else tuple(_sentence(*f) for f in findings)
        )
        environment = describe(
            shlex.join(["shardwise", *sys.argv[1:]]),
            started.isoformat(timespec="seconds"),
            device_type=self.request.device_type,
            world_size=self.request.mesh.world_size,
        )
        return Comparison(
            model=self.request.spec.name,
            parameters=self.request.spec.config.n_parameters,
            mesh=str(self.request.mesh),
            settings=job.settings,
            module=job.module if job.module_only else None,
            rounds=job.rounds,
            warmup=1 + job.warmup,
            environment=replace(environment, variables=reports[0].variables),
            text=stream.summary,
            measurements=measurements,
            standings=found,
            noise=noise_of(measurements, found) if measurements else None,
            verdict=lines,
            notes=(*notes(measurements), *reports[0].notes, *_text_notes(stream)),
        )

    def _deliver(
        self, comparison: Comparison, report: "RankReport", folder: "RunFolder", pages: dict[str, str]
    ) -> int:
        """Terminal or JSON first, then files: a disk that is full by now loses nothing that was measured."""
        from shardwise.files.document import write_document
        from shardwise.report.common.deliver import show, write_all

        findings = _findings(report)
        if self.as_json or not findings:
            show(comparison, "json" if self.as_json else "terminal", self.console)
        else:
            for finding in findings:
                self.console.print(_sentence(*finding), markup=False, highlight=False, soft_wrap=True)
        if comparison.measurements:
            for name, content in pages.items():
                folder.write(name, content)
            page = write_all(comparison, folder)
            self.console.print(f"\nReport: {page}", markup=False, highlight=False, soft_wrap=True)
        else:
            folder.write("comparison.json", write_document(comparison))
        return 1 if findings else 0


def _on_event(folder: "RunFolder", progress: "ProgressLine", event: bytes) -> None:
    """To disk first: nothing that was measured is lost."""
    from shardwise.verbs.compare_ranks import Progress

    folder.append_event(event)
    step = msgspec.json.decode(event, type=Progress)
    progress(step.text, step.done, step.total)


def _findings(report: "RankReport") -> list[tuple[str, Finding, Agreement | None]]:
    """Every reason why the answer is no: (plan, finding, its agreement)."""
    return [("all plans", finding, None) for finding in report.findings] + [
        (agreement.plan, finding, agreement)
        for agreement in report.agreements
        for finding in agreement.findings
    ]


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


def _check_positive(option: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise OptionError(f"{option} is {value}. Use a number above 0.")


def _check_compile(settings: StepSettings, plans: list[Plan]) -> None:
    if settings.compiled:
        raise OptionError(
            "--compile isn't offered yet: the styles' collectives would have to be known to the compiler, and a step that compiles around "
            "them isn't the step that was checked. Leave it out."
        )


def _check_module(spec: "ModelSpec", module: str, mesh: Mesh) -> None:
    names = [name for name, _ in spec.build().named_modules() if name]
    if module not in names:
        shown = names[:3] + [name for name in names[3:] if "." not in name]
        raise OptionError(
            f'--module: {spec.name} has no module "{module}".{suggest(module, names)} It has {", ".join(shown)}, ...'
        )
    if mesh.fsdp > 1:
        raise OptionError(
            f"--module {module}: FSDP gathers a module's parameters for a whole layer, so one can't be timed alone. Use tp or dp."
        )


def _check_fit(
    spec: "ModelSpec", plans: list[Plan], mesh: Mesh, settings: StepSettings, device_type: str, repeat: bool
) -> None:
    """Every plan against the model, then the machine against what they need."""
    import torch

    from shardwise.launch.environment import available_memory
    from shardwise.parallel.need import refuse_too_large
    from shardwise.parallel.resolve import resolve

    model = spec.build()
    for plan in plans:
        resolve(model, plan, tp=mesh.tp, seq=settings.seq, fsdp=mesh.fsdp)
    refuse_too_large(
        model,
        spec.name,
        plans,
        mesh,
        getattr(torch, settings.dtype),
        device_type=device_type,
        copies=len(plans) + repeat,
        available=available_memory() if _ranks_here(mesh) == mesh.world_size else None,
    )


def _check_layers(spec: "ModelSpec", mesh: Mesh, device_type: str) -> int:
    """Depth at which the unsharded model fits beside a sharded one, in float64: weights and gradients of both, on every rank of a device."""
    import torch

    from shardwise.launch.environment import available_memory

    if device_type == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory * 0.7
    else:
        room = (available_memory() or 2**33) * 0.5 / _ranks_here(mesh)
    for layers in (spec.config.n_layers, 2, 1):
        parameters = spec.with_layers(layers).config.n_parameters
        if 16 * parameters * (1 + 1 / mesh.tp) <= room:
            return layers
    raise OptionError(
        f"--check: not even one layer of {spec.name} fits unsharded in float64 here. Leave the check out with --no-check."
    )


def _device_type(device: str, mesh: Mesh) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= _ranks_here(mesh) else "cpu"


def _ranks_here(mesh: Mesh) -> int:
    """Ranks on this host: all of them, unless torchrun says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))


def _threads(request: _Request) -> int:
    from shardwise.launch.environment import cores

    return max(1, cores() // _ranks_here(request.mesh))


def _text_notes(stream: "TokenStream") -> list[str]:
    summary = stream.summary
    highest = int(stream.ids.max())
    if highest < 0.9 * summary.vocab_size:
        return [
            f"The text's ids end at {highest:,} of {summary.vocab_size:,}: the tokenizer found no more pairs to merge. The upper part of the table "
            "is never looked up, which concentrates rowwise and contiguous routed look-ups on the first ranks."
        ]
    return []
