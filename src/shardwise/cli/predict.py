"""`shardwise predict`: time and memory of plans on a machine that needn't be there, term by term."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from shardwise.cli.asked import STEP, Call, Command, Shown, command, refuse
from shardwise.cli.output import OUTPUT
from shardwise.cli.progress import ProgressLine
from shardwise.core.case import RECOMPUTE, SHARED
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.named_path import case_for_file
from shardwise.core.option import Asked, Option, check_choice, options_of
from shardwise.core.shown import shown
from shardwise.files.case import case_text, said_by
from shardwise.verbs.checks import DEFAULT_PLAN
from shardwise.verbs.predict import MACHINE, SEQ, Predicted, PredictOptions, predict_program
from shardwise.verbs.predict import predict as predict_case

# what a Setup adds to a trace without recompute; the others of RECOMPUTE are traced
SELECTIVE = "selective"
CASE = "case.toml"
SWEEP = "Sweep"
LOOK_UP = "Rowwise or colwise"
# what a saved program has decided already, what a sweep has no use for, and what is a sweep's alone
_OF_PROGRAM = (
    "plans",
    "model",
    "batch",
    "seq",
    "dtype",
    "param_dtype",
    "reduce_dtype",
    "expert_load",
    "random_ids",
    "save_program",
)
_NOT_SWEPT = ("program", "save_program")
_OF_SWEEP = ("devices", "micro_batches")
_NOT_LOOKED_UP = ("sweep", "devices", *_NOT_SWEPT)


@dataclass(frozen=True, slots=True)
class _Asked(PredictOptions):
    sweep: Annotated[
        bool,
        Option(
            "Over all pp x dp x fsdp x tp of --devices, and micro-batch sizes; with --chunks interleaved "
            "pipelines too.",
            SWEEP,
        ),
    ] = False
    devices: Annotated[int | None, Option("Of a sweep.", SWEEP, 1, shown="one node's")] = None
    micro_batches: Annotated[
        str | None,
        Option(
            "Of a sweep or --look-up: sequences per data-parallel rank at a time.", SWEEP, shown="1,2,4,8"
        ),
    ] = None
    top: Annotated[int, Option("Rows of a sweep's table; all are in the JSON and on the page.", SWEEP, 1)] = (
        20
    )
    look_up: Annotated[
        bool,
        Option(
            "The table of token ids alone, under each style: which is best from how many ranks on.", LOOK_UP
        ),
    ] = False
    degrees: Annotated[
        str | None,
        Option("Of --look-up: tensor-parallel ranks.", LOOK_UP, shown="2,4,8 ... up to one node's"),
    ] = None
    program: Annotated[
        Path | None,
        Option("Predict from a saved program instead of tracing; torch isn't needed.", OUTPUT, shown="none"),
    ] = None
    save_program: Annotated[
        Path | None, Option("File for the traced program, for --program.", OUTPUT, shown="none")
    ] = None
    context: Annotated[str | None, Option("An axis of the mesh now.", is_hidden=True)] = None


def _prepare(values: dict[str, Any]) -> None:
    if values["context"] is not None:
        raise OptionError(
            "context ranks are an axis of the mesh. Instead of --context 2 write --mesh cp=2,tp=8."
        )
    selective_recompute(values)
    if values["mesh"] is None and not (values["sweep"] or values["look_up"] or values["program"]):
        values["mesh"] = "tp=8"


STEP_KEYS = (
    *STEP,
    "context_attention",
    "recompute_layers",
    "schedule",
    "chunks",
    "stages",
    "optimizer_kernel",
    "expert_load",
    "random_ids",
)
"""What of a case a predicted step is decided by."""


def selective_recompute(values: dict[str, Any]) -> None:
    """--recompute selective is what a Setup adds."""
    check_choice("--recompute", values["recompute"], (RECOMPUTE[0], SELECTIVE, *RECOMPUTE[1:]))
    if values["recompute"] == SELECTIVE:
        values |= {"recompute": "none", "recompute_attention": True}


@command(
    Command(
        _Asked,
        shared=STEP_KEYS,
        prepare=_prepare,
        defaults={
            "plans": Shown(DEFAULT_PLAN),
            "model": "llama3-8b",
            "mesh": Shown("tp=8; the program's own with --program"),
            "machine": MACHINE,
            "batch": Shown("one per data-parallel rank and micro-batch"),
            "seq": SEQ,
        },
        about={
            "plans": "Built-in plans, .toml files, hf, hf-ep, own or unsharded; the first is what the others "
            "are held against.",
            "mesh": "Axes of ranks, such as pp=4,fsdp=8,cp=2,tp=8: pipeline stages, data-parallel, "
            "context and tensor-parallel ranks.",
            "recompute": "Again in the backward: none, selective (unfused attention), selective-ops (all of "
            "a layer "
            "but fused attention and every second matmul) or full.",
            "random_ids": "Uniform random ids instead of text, for routed plans.",
        },
        out="Folder for the page, the data, the case as a file, and the predicted step as a trace for "
        "ui.perfetto.dev.",
    )
)
def predict(call: Call[_Asked]) -> int:
    """Predict time and memory of plans on a machine that you needn't have, term by term.

    One micro-batch of the real module under the real plan is traced on fake tensors; the machine's constants,
    each with its source, make times of it. Exit code 1 where a plan doesn't fit in the machine's memory.

    [dim]shardwise predict --dtype bfloat16[/]
    [dim]shardwise predict rowwise colwise routed --model llama3-70b --mesh fsdp=8,tp=8 --dtype bfloat16[/]
    [dim]shardwise predict --model gpt3-175b --mesh pp=8,dp=8,tp=8 --accumulation 16 --seq 2048 --out page[/]
    [dim]shardwise predict --sweep --devices 64 --model llama3-70b --batch 512 --dtype bfloat16[/]
    [dim]shardwise predict --look-up --model hf:qwen3 --degrees 2,4,8,16 --text notes/[/]
    [dim]shardwise predict --save-program 8b.json; shardwise predict --program 8b.json --machine mine.toml[/]
    """
    if call.own.look_up:
        refuse(call.given, _NOT_LOOKED_UP, "--look-up has no use for it. Leave it out")
        return _look_up(call)
    refuse(call.given, ("degrees",), "it is --look-up's. Add that, or leave it out")
    if call.own.sweep:
        refuse(
            call.given, _NOT_SWEPT, "a sweep goes over it, or has no use for it. Leave it out beside --sweep"
        )
        return _sweep(call)
    refuse(call.given, _OF_SWEEP, "it is a sweep's. Add --sweep, or leave it out")
    save = call.own.save_program
    if save is not None and len(call.case.plans) > 1:
        raise OptionError(
            f"--save-program {shown(save)}: is one program's, and {len(call.case.plans)} plans are given. "
            "Give one plan."
        )
    with ProgressLine() as progress:
        done = predict_case(call.case, call.own, progress) if call.own.program is None else _saved(call)
    if save is not None:
        from shardwise.files.program_file import write_program

        write_program(done.steps[0].layout.program, save)
    return _deliver(call, done)


def _saved(call: Call[_Asked]) -> Predicted:
    from shardwise.files.program_file import load_program

    is_traced = call.case.step.recompute != "none"
    decided = (*_OF_PROGRAM, *(("recompute",) if is_traced else ()))
    why = "a saved program has its own. Leave it out beside --program, or trace without --program"
    refuse(call.given, decided, why)
    assert call.own.program is not None
    mesh = call.case.mesh if "mesh" in call.given else None
    machine, step = call.case.machine or MACHINE, call.case.step
    program = load_program(call.own.program)
    return predict_program(program, machine, call.own, mesh, step.accumulation, step)


def _deliver(call: Call[_Asked], done: Predicted) -> int:
    from shardwise.files.document import write_document
    from shardwise.files.perfetto import perfetto_trace

    run = done.answer
    first = run.predictions[0]
    asked = {
        "model": first.model,
        "plans": [prediction.plan for prediction in run.predictions],
        "mesh": str(Mesh(first.axes)),
        "machine": run.machine.name,
        "settings": run.settings,
        "setup": first.setup,
    }
    traces: dict[str, str] = {}

    def beside() -> dict[str, bytes]:
        made = {f"{name}.json": write_document(step) for name, step in done.line_by_line()}
        if call.own.program is None:  # a saved program has a case of its own
            made[CASE] = _case(call).encode()
        for name, label, timelines in done.timelines():
            made[f"{name}.json.gz"] = perfetto_trace(timelines)
            traces[f"{name}.json.gz"] = label
        return made

    call.output.deliver(run, asked, beside)
    for name, label in traces.items():
        call.output.say_file(f"{shown(label)}, for ui.perfetto.dev", name)
    return 0 if run.fits else 1


def _case(call: Call[_Asked]) -> str:
    """What was asked, as a file in the folder."""
    case = replace(call.case, machine=call.case.machine or MACHINE)
    case = case_for_file(case, call.output.out)
    return case_text(case, said_by(case), {}, {"predict": said_of(call.own)})


def said_of(own: PredictOptions) -> tuple[tuple[Asked, Any], ...]:
    """What of predict's own is otherwise than by default, for its table in a case file."""
    values = [(asked, getattr(own, asked.field)) for asked in options_of(PredictOptions)]
    said = [(asked, value) for asked, value in values if value != asked.default]
    if own.recompute_attention:
        said += [(asked, SELECTIVE) for asked in SHARED if asked.key == "recompute"]
    return tuple(said)


def _sweep(call: Call[_Asked]) -> int:
    from shardwise.verbs.sweep import MICRO_BATCHES, SweepOptions, sweep

    sizes = (
        MICRO_BATCHES if call.own.micro_batches is None else _sizes("--micro-batches", call.own.micro_batches)
    )
    with ProgressLine() as progress:
        found = sweep(call.case, SweepOptions(call.own.devices, sizes), call.own, progress)
    labels = [each.plan for each in found.points] + [each.plan for each in found.refused]
    asked = {
        "model": found.model,
        "plans": call.case.plans or tuple(dict.fromkeys(labels)),
        "devices": found.devices,
        "machine": found.machine.name,
        "setup": found.setup,
    }
    call.output.deliver(found, asked, most=call.own.top)
    return 0 if any(point.fits for point in found.points) else 1


def _look_up(call: Call[_Asked]) -> int:
    from shardwise.verbs.look_up import LookUpOptions, look_up

    degrees, batches = (
        _sizes(option, given) if given is not None else ()
        for option, given in (("--degrees", call.own.degrees), ("--micro-batches", call.own.micro_batches))
    )
    with ProgressLine() as progress:
        found = look_up(call.case, LookUpOptions(degrees, batches), call.own, progress)
    asked = {
        "model": found.model,
        "plans": found.plans,
        "machine": found.machine.name,
        "settings": found.settings,
    }
    call.output.deliver(found, asked)
    return 0 if found.points else 1


def _sizes(option: str, given: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4)."""
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and len(part) < 7 and int(part) for part in parts):
        raise OptionError(f'{option} is "{shown(given)}". Write sizes with commas between, such as 1,2,4.')
    return tuple(sorted({int(part) for part in parts}))
