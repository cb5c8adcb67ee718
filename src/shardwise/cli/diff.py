"""`shardwise diff`: read the profiles of all ranks of one run or two, or of a run and a prediction, and say
where the time went."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from shardwise.cli.asked import Call, Command, Shown, command, refuse
from shardwise.cli.predict import STEP_KEYS, selective_recompute
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.core.option import Option
from shardwise.core.shown import shown
from shardwise.verbs.checks import DEFAULT_PLAN
from shardwise.verbs.diff import DiffOptions
from shardwise.verbs.diff import diff as diff_runs
from shardwise.verbs.predict import HOW, MACHINE, SEQ

PREDICTS = "Predict a side (--predict)"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked(DiffOptions):
    first: Annotated[
        Path,
        Option(
            "A trace file, a folder with one per rank, or a run folder of predict --out or "
            "compare --profile: of two plans it is their comparison; of more, name RUN/traces/PLAN or a "
            "file.",
            is_argument=True,
        ),
    ]
    second: Annotated[
        Path | None,
        Option(
            "Another, to be compared with the first; of a prediction and a profile, either may come first.",
            shown="none",
            is_argument=True,
        ),
    ] = None
    predict: Annotated[bool, Option("Predict the step that was profiled, and lay it beside.", PREDICTS)] = (
        False
    )
    plans: Annotated[
        tuple[str, ...], Option("The plan that is predicted.", PREDICTS, flag="--plan", shown=DEFAULT_PLAN)
    ] = ()


@command(
    Command(
        _Asked,
        shared=STEP_KEYS,
        defaults={
            "model": "llama3-debug",
            "mesh": Shown("tp=8"),
            "machine": Shown(MACHINE),
            "batch": Shown("one per data-parallel rank and micro-batch"),
            "seq": Shown(str(SEQ)),
        },
        panels=dict.fromkeys(STEP_KEYS, PREDICTS),
        prepare=selective_recompute,
        out="Folder for the page, the data, and a trace of all ranks on one clock for ui.perfetto.dev.",
    )
)
def diff(call: Call[_Asked]) -> int:
    """Read profiles (Kineto or Chrome JSON, plain or gzip) of all ranks, and say where the time of a step
    went.

    Each step is split into compute, exposed waiting, exposed transfer, exposed copies and idle time, which
    add up to it exactly. Waiting can only be told from transfer where the files of all ranks of a group are
    there. With a second run, what differs is found and said. With a prediction (a folder of predict --out, or
    --predict and a case) beside a run: which terms, kernels, collectives and launches were predicted too fast
    or too slow, and what isn't modelled.

    [dim]shardwise diff run-a/traces run-b/traces[/]
    [dim]shardwise diff rank0.json.gz[/]
    [dim]shardwise diff runs/compare-1 --out page[/]
    [dim]shardwise diff runs/compare-1/traces/rowwise runs/compare-1/traces/colwise --out page[/]
    [dim]shardwise diff predicted runs/compare-1/traces/rowwise[/]
    [dim]shardwise diff runs/compare-1/traces/rowwise --predict --plan rowwise --mesh tp=2 --batch 4 --seq 256
    --machine mine.toml[/]
    """
    case = _predicted(call)
    with ProgressLine() as progress:
        done = diff_runs(call.own.first, call.own.second, call.own, progress, case=case)
    from shardwise.files.perfetto import perfetto_trace

    labels = done.labels
    names = [f"aligned-{side}.json.gz" for side, _ in zip("ab", labels, strict=False)]
    call.output.deliver(
        done.answer,
        {"runs": labels},
        beside=lambda: dict(zip(names, map(perfetto_trace, done.timelines), strict=True)),
        page=lambda: {"pictures": done.pictures()},
    )
    for label, name in zip(labels, names, strict=True):
        call.output.say_file(f"All ranks of {shown(label)} on one clock, for ui.perfetto.dev", name)
    return 0


def _predicted(call: Call[_Asked]) -> Any:
    """The case that is to be predicted. Raises OptionError for what only a prediction takes."""
    if not call.own.predict:
        refuse(call.typed, (*STEP_KEYS, *_assumed()), "it is a prediction's. Add --predict, or leave it out")
        return None
    if len(call.own.plans) > 1 and "plans" in call.typed:
        raise OptionError("--plan is given more than once. A run has one plan: name that one.")
    return replace(call.case, plans=call.own.plans[:1])


def _assumed() -> tuple[str, ...]:
    """What says how a predicted step runs."""
    from shardwise.core.option import options_of

    return tuple(asked.key for asked in options_of(DiffOptions) if asked.option.panel == HOW)
