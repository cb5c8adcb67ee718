"""`shardwise explain`: what a plan does and why, from one step traced on fake tensors; no GPU, no ranks."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shardwise.cli.asked import TRACED, Call, Command, Shown, command
from shardwise.cli.output import pretty
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.option import Option, check_choice
from shardwise.verbs.checks import DEFAULT_PLAN
from shardwise.verbs.explain import LONG_SEQ, Explained, ExplainOptions
from shardwise.verbs.explain import explain as explain_case

if TYPE_CHECKING:
    from shardwise.files.run_folder import RunFolder

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, slots=True)
class _Asked(ExplainOptions):
    walk: Annotated[
        str | None,
        Option(
            "Instead: walk through this module under the plan, with small numbers, step by step. Such as "
            "tok_embeddings."
        ),
    ] = None
    dims: Annotated[
        bool,
        Option(
            "Instead: which dims of the model's weights must be cut together, where a cut begins and ends, "
            "and what can't be cut; beside it what a plan of yours does with each weight."
        ),
    ] = False


def _prepare(values: dict[str, Any]) -> None:
    if values["device"] == "auto":
        values["device"] = DEVICES[0]
    check_choice("--device", values["device"], DEVICES)


@command(
    Command(
        _Asked,
        shared=TRACED,
        prepare=_prepare,
        one_plan=True,
        defaults={
            "plans": Shown(DEFAULT_PLAN),
            "model": "llama3-8b",
            "mesh": "tp=8",
            "device": "cuda",
            "batch": Shown("one per data-parallel rank and micro-batch"),
            "seq": Shown(f"{LONG_SEQ}, or what the model has positions for"),
        },
        about={
            "plans": "A built-in plan, a .toml file, hf or hf-ep (a Hugging Face model's own), own "
            "(sharded by your factory), or unsharded.",
            "device": "The device type whose ops and collectives are shown: cuda or cpu. None is needed.",
            "seed": "Of the random ids.",
            "text": "Text files or folders for the token ids; routed plans take Python's own documentation "
            "by "
            "default, others random ids.",
        },
        out="Folder for the page, the walk-through as a page, the data, and the whole step op by op as text.",
    )
)
def explain(call: Call[_Asked]) -> int:
    """Show every collective of a plan, why it is there, and what a rank holds: in seconds, without a GPU.

    One training step is run on fake tensors: the real module under the real plan, with no memory and no
    devices. --against puts a second plan beside it. --walk shows a module at work on small numbers, rank by
    rank; --dims why its weights are cut as they are.

    [dim]shardwise explain[/]
    [dim]shardwise explain rowwise@dtensor --against rowwise --model llama3-70b --mesh tp=8 --out page[/]
    [dim]shardwise explain --model hf:qwen3 --mesh tp=8[/]
    [dim]shardwise explain own --model mypackage.models:build --mesh tp=4[/]
    [dim]shardwise explain rowwise --walk tok_embeddings[/]
    [dim]shardwise explain --dims --model hf:qwen3 --mesh tp=8 --out page[/]
    """
    if call.own.dims:
        return _dims(call)
    if call.own.walk is not None:
        return _walk(call, call.own.walk)
    with ProgressLine() as progress:
        done = explain_case(call.case, call.own, progress)
    from shardwise.report.explain.program_text import program_text

    names = ("program.txt", "against.txt")
    call.output.deliver(
        done.answer,
        _settings(done),
        beside=lambda: {
            **dict(zip(names, map(program_text, done.programs), strict=False)),
            "walkthrough.html": _walkthroughs(),
        },
        page=lambda: {"walkthrough_href": "walkthrough.html"},
    )
    return 0


def _settings(done: Explained) -> dict[str, object]:
    """What was asked: the model, the plans, and the step."""
    first = done.explanations[0]
    return {
        "model": first.model,
        "plans": [explanation.plan for explanation in done.explanations],
        "mesh": str(Mesh(first.axes)),
        "device": first.device,
        "settings": first.settings,
    }


def _dims(call: Call[_Asked]) -> int:
    for flag, value in (("--walk", call.own.walk), ("--against", call.own.against)):
        if value is not None:
            raise OptionError(f"--dims and {flag} don't go together. Leave one out.")
    from shardwise.verbs.plan import dims

    with ProgressLine() as progress:
        found = dims(call.case, progress)
    call.output.deliver(found, {"model": found.model, "mesh": found.mesh, "plan": found.plan})
    return 0


def _walk(call: Call[_Asked], what: str) -> int:
    from shardwise.report.walkthrough.terminal import render_walkthrough
    from shardwise.verbs.walk import walk
    from shardwise.walkthrough.words import explain_walkthrough

    recorded = walk(call.case, what)
    document = pretty({"schema_version": 1, "walkthrough": recorded})
    call.output.draw(document, partial(render_walkthrough, explain_walkthrough(recorded)))

    def write(folder: "RunFolder") -> Path:
        return folder.write("walkthrough.html", _walkthroughs())

    asked = {"model": call.case.model, "plans": call.case.plans, "walk": what}
    call.output.keep("walk", asked, write, anchor=f"#{recorded.subject}")
    return 0 if recorded.agrees else 1


def _walkthroughs() -> str:
    """A page of all of them, recorded now."""
    from shardwise.report.walkthrough.html import walkthrough_html
    from shardwise.walkthrough.record import record_walkthrough
    from shardwise.walkthrough.subject import subjects
    from shardwise.walkthrough.words import explain_walkthrough

    return walkthrough_html([explain_walkthrough(record_walkthrough(subject)) for subject in subjects()])
