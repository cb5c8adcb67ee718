"""`shardwise diff`: read the profiles of all ranks of one run or two, and say where the time went."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shardwise.cli.asked import Call, Command, command
from shardwise.cli.progress import ProgressLine
from shardwise.core.option import Option
from shardwise.verbs.diff import DiffOptions
from shardwise.verbs.diff import diff as diff_runs


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
        Path | None, Option("Another, to be compared with the first.", shown="none", is_argument=True)
    ] = None


@command(
    Command(
        _Asked,
        out="Folder for the page, the data, and a trace of all ranks on one clock for ui.perfetto.dev.",
    )
)
def diff(call: Call[_Asked]) -> int:
    """Read profiles (Kineto or Chrome JSON, plain or gzip) of all ranks, and say where the time of a step
    went.

    Each step is split into compute, exposed waiting, exposed transfer, exposed copies and idle time, which
    add up to it exactly. Waiting can only be told from transfer where the files of all ranks of a group are
    there. With a second run, what differs is found and said.

    [dim]shardwise diff run-a/traces run-b/traces[/]
    [dim]shardwise diff rank0.json.gz[/]
    [dim]shardwise diff runs/compare-1 --out page[/]
    [dim]shardwise diff runs/compare-1/traces/rowwise runs/compare-1/traces/colwise --out page[/]
    """
    with ProgressLine() as progress:
        done = diff_runs(call.own.first, call.own.second, call.own, progress)
    from shardwise.files.perfetto import perfetto_trace

    labels = [run.label for run in done.runs]
    names = [f"aligned-{side}.json.gz" for side, _ in zip("ab", labels, strict=False)]
    call.output.deliver(
        done.answer,
        {"runs": labels},
        beside=lambda: dict(zip(names, map(perfetto_trace, done.timelines), strict=True)),
        page=lambda: {"pictures": done.pictures()},
    )
    for label, name in zip(labels, names, strict=True):
        call.output.say_file(f"All ranks of {label} on one clock, for ui.perfetto.dev", name)
    return 0
