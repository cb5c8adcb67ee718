"""`shardwise explain`: every collective of a plan, why it is there, and what a rank holds, in seconds and
without a GPU."""

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    default_plan,
)
from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError
from shardwise.core.mesh import RUN, Mesh, check_carried
from shardwise.core.plan import AnyPlan, Plan, suggest
from shardwise.text.traced_ids import token_ids

if TYPE_CHECKING:
    from shardwise.cli.progress import ProgressLine
    from shardwise.core.explanation import Explanation
    from shardwise.core.program import Program
    from shardwise.models.source import ModelSource

DEVICES = ("cuda", "cpu")
LONG_SEQ = 8192
_MODEL, _OUTPUT = "Model and mesh", "Output"


def explain(
    context: typer.Context,
    plan: Annotated[
        str | None,
        typer.Argument(
            help="A built-in plan, a .toml file, hf (a Hugging Face model's own), own (sharded by your factory), or unsharded.",
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
    against: Annotated[str | None, typer.Option(help="A second plan, to be put beside the first.")] = None,
    walk: Annotated[
        str | None,
        typer.Option(
            help="Instead: walk through this module under the plan, with small numbers, step by step. Such as tok_embeddings."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="A model of `shardwise models`, hf:TYPE, hf:PATH or package.module:factory.",
            rich_help_panel=_MODEL,
        ),
    ] = "llama3-8b",
    mesh: Annotated[
        str,
        typer.Option(
            help="Axes of ranks: tp, with dp or fsdp before it, such as fsdp=2,tp=8.", rich_help_panel=_MODEL
        ),
    ] = "tp=8",
    device: Annotated[
        str,
        typer.Option(
            help="The device type whose ops and collectives are shown: cuda or cpu. None is needed.",
            rich_help_panel=_MODEL,
        ),
    ] = "cuda",
    rank: Annotated[
        int, typer.Option(help="The rank whose step is shown.", min=0, rich_help_panel=_MODEL)
    ] = 0,
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
    seq: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence.",
            min=1,
            show_default=f"{LONG_SEQ}, or what the model has positions for",
            rich_help_panel=STEP,
        ),
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Of the random ids.", min=0, rich_help_panel=STEP)] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text files or folders for the token ids; routed plans take Python's own documentation by default, others random ids.",
            rich_help_panel=STEP,
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
    compress: Annotated[
        bool,
        typer.Option(
            "--compress/--no-compress",
            help="Trace equal layers once; what comes out is the same.",
            rich_help_panel=_OUTPUT,
        ),
    ] = True,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the page, the walk-through as a page, the data, and the whole step op by op as text.",
            show_default="none",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> int:
    """Show every collective of a plan, why it is there, and what a rank holds: in seconds, without a GPU.

    One training step is run on fake tensors: the real module under the real plan, with no memory and no
    devices. --against puts a second plan beside it. --walk shows a module at work on small numbers, rank by
    rank.

    [dim]shardwise explain[/]
    [dim]shardwise explain rowwise@dtensor --against rowwise --model llama3-70b --mesh tp=8 --out page[/]
    [dim]shardwise explain --model hf:qwen3 --mesh tp=8[/]
    [dim]shardwise explain own --model mypackage.models:build --mesh tp=4[/]
    [dim]shardwise explain rowwise --walk tok_embeddings[/]
    """
    shape = Mesh.parse(mesh)
    check_carried(shape, "explain", RUN)
    check_choice("--recompute", recompute, RECOMPUTE)
    check_choice("--device", device, DEVICES)
    console = Console(stderr=as_json)
    chosen = plan or default_plan(model)
    if walk is not None:
        return _walk(chosen, walk, model, sequence_parallel, console, as_json=as_json, out=out)
    from shardwise.models.source import find_model

    source = find_model(model)
    settings = StepSettings(
        batch=batch or shape.data_parallel * accumulation,
        seq=seq or min(LONG_SEQ, source.max_seq or LONG_SEQ),
        dtype=dtype,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        accumulation=accumulation,
        recompute=recompute,
        seed=seed,
    )
    check_precision(settings, shape)
    check_batch(settings, shape)
    check_seq(settings.seq, source)
    run = _Run(
        source, shape, settings, device, rank, sequence_parallel, text or [], tokenizer, random_ids, compress
    )
    return _explain(run, chosen, against, console, as_json=as_json, out=out)


@dataclass(frozen=True, slots=True)
class _Run:
    """What all plans of one command share."""

    source: "ModelSource"
    mesh: Mesh
    settings: StepSettings
    device: str
    rank: int
    sequence_parallel: bool
    files: list[Path]
    tokenizer: Path | None
    random_ids: bool
    compress: bool

    def program(self, plan: AnyPlan, progress: "ProgressLine") -> "Program":
        from shardwise.parallel.styles import is_decided_by_data
        from shardwise.trace.trace import trace

        return trace(
            self.source,
            plan,
            self.mesh,
            self.settings,
            device=self.device,
            rank=self.rank,
            ids=token_ids(
                self.source,
                self.settings,
                is_decided_by_data(plan),
                progress.say,
                files=self.files,
                tokenizer=self.tokenizer,
                random_ids=self.random_ids,
            ),
            compress=self.compress,
            progress=progress.say,
        )


def _explain(
    run: _Run, plan: str, against: str | None, console: Console, *, as_json: bool, out: Path | None
) -> int:
    from shardwise.cli.progress import ProgressLine
    from shardwise.explain.explain import explain
    from shardwise.parallel.plans import load_any_plan

    family = run.source.family
    plans = [
        load_any_plan(name, sequence_parallel=run.sequence_parallel, family=family)
        for name in (plan, against)
        if name is not None
    ]
    with ProgressLine() as progress:
        programs = [run.program(chosen, progress) for chosen in plans]
        progress.say("explaining")
        found = [explain(program) for program in programs]
    return _deliver(programs, found, console, as_json=as_json, out=out)


def _deliver(
    programs: "list[Program]",
    found: "list[Explanation]",
    console: Console,
    *,
    as_json: bool,
    out: Path | None,
) -> int:
    from shardwise.explain.contrast import contrast
    from shardwise.files.document import write_document
    from shardwise.report.explain.terminal import render_contrast, render_explanation

    first, *others = found
    both = contrast(first, others[0]) if others else None
    document = write_document(both) if both is not None else write_document(first)
    if as_json:
        sys.stdout.buffer.write(document)
        sys.stdout.buffer.flush()
    elif both is not None:
        render_contrast(both, console)
    else:
        render_explanation(first, console)
    if out is not None:
        from shardwise.files.run_folder import RunFolder
        from shardwise.report.explain.html import contrast_html, explanation_html
        from shardwise.report.explain.program_text import program_text

        with RunFolder(out, "explain", datetime.now(UTC), has_events=False) as folder:
            folder.write("settings.json", _settings_json(found))
            folder.write("explanation.json", document)
            for name, program in zip(("program.txt", "against.txt"), programs, strict=False):
                folder.write(name, program_text(program))
            folder.write("walkthrough.html", _walkthrough_page())
            page = (
                contrast_html(both, "walkthrough.html")
                if both is not None
                else explanation_html(first, "walkthrough.html")
            )
            path = folder.write("explain.html", page)
        console.print(f"\nPage: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _settings_json(found: "list[Explanation]") -> bytes:
    """What was asked: the model, the plans, and the step."""
    import msgspec

    first = found[0]
    asked = {
        "model": first.model,
        "plans": [explanation.plan for explanation in found],
        "mesh": str(Mesh(first.axes)),
        "device": first.device,
        "settings": first.settings,
    }
    return msgspec.json.format(msgspec.json.encode(asked), indent=2) + b"\n"


def _walkthrough_page() -> str:
    """All walk-throughs, recorded now."""
    from shardwise.report.walkthrough.html import walkthrough_html
    from shardwise.walkthrough.record import record_walkthrough
    from shardwise.walkthrough.subject import subjects
    from shardwise.walkthrough.words import explain_walkthrough

    return walkthrough_html([explain_walkthrough(record_walkthrough(subject)) for subject in subjects()])


def _walk(
    plan: str,
    what: str,
    model: str,
    sequence_parallel: bool,
    console: Console,
    *,
    as_json: bool,
    out: Path | None,
) -> int:
    import msgspec

    from shardwise.report.walkthrough.terminal import render_walkthrough
    from shardwise.walkthrough.record import record_walkthrough
    from shardwise.walkthrough.words import explain_walkthrough

    subject, module = _subject(plan, what, model, sequence_parallel)
    recorded = record_walkthrough(subject, module=module)
    told = explain_walkthrough(recorded)
    if as_json:
        sys.stdout.buffer.write(
            msgspec.json.format(msgspec.json.encode({"schema_version": 1, "walkthrough": recorded}), indent=2)
            + b"\n"
        )
    else:
        render_walkthrough(told, console)
    if out is not None:
        from shardwise.files.run_folder import RunFolder

        with RunFolder(out, "walk", datetime.now(UTC), has_events=False) as folder:
            path = folder.write("walkthrough.html", _walkthrough_page())
        console.print(f"\nPage: {path}#{subject}", markup=False, highlight=False, soft_wrap=True)
    return 0 if recorded.agrees else 1


def _subject(plan: str, what: str, model: str, sequence_parallel: bool) -> tuple[str, str | None]:
    """(walk-through, module) for a walk-through's name (embedding/rowwise), or for a module of the model
    under the plan; "loss" is one too."""
    from shardwise.walkthrough.subject import subject_of, subjects

    names = ", ".join(subjects())
    if what in subjects():
        return what, None
    if what == "loss":
        return "loss/vocab_parallel", None
    import torch

    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan

    source = find_model(model)
    chosen = load_any_plan(plan, sequence_parallel=sequence_parallel, family=source.family)
    modules = dict(source.build(dtype=torch.float32).named_modules())
    if what not in modules:
        hint = suggest(what[:80], modules)
        raise OptionError(f'--walk: {model} has no module "{what[:80]}".{hint} Or name one of {names}, loss.')
    rule = chosen.rule_for(what) if isinstance(chosen, Plan) else None
    module_type = type(modules[what]).__name__
    subject = None if rule is None else subject_of(module_type, rule.style)
    if subject is None:
        style = "no style" if rule is None else rule.style.name
        raise OptionError(
            f"--walk: {what}, a {module_type} under {style}, has no walk-through. There are: {names}, loss."
        )
    return subject.name, what
