"""`shardwise diff`: read the profiles of all ranks of one run or two, and say where the time went."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from shardwise.core.errors import OptionError

if TYPE_CHECKING:
    from shardwise.cli.progress import ProgressLine
    from shardwise.core.timeline import Timeline

_OUTPUT = "Output"


def diff(
    first: Annotated[
        Path,
        typer.Argument(
            help="A trace file, a folder with one per rank, or a run folder of compare --profile."
        ),
    ],
    second: Annotated[
        Path | None, typer.Argument(help="Another, to be compared with the first.", show_default="none")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="What to call them, comma-separated.", show_default="the files' names"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Files read at once; each takes some memory.", min=1, show_default="as many as cores"
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the page, the data, and a trace of all ranks on one clock for ui.perfetto.dev.",
            show_default="none",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> int:
    """Read profiles (Kineto or Chrome JSON, plain or gzip) of all ranks, and say where the time of a step went.

    Each step is split into compute, exposed waiting, exposed transfer, exposed copies and idle time, which add up to it exactly. Waiting can
    only be told from transfer where the files of all ranks of a group are there. With a second run, what differs is found and said.

    [dim]shardwise diff run-a/traces run-b/traces[/]
    [dim]shardwise diff rank0.json.gz[/]
    [dim]shardwise diff runs/compare-1/traces/rowwise runs/compare-1/traces/colwise --labels rowwise,colwise --out page[/]
    """
    paths = [path for path in (first, second) if path is not None]
    names = _labels(labels, paths)
    console = Console(stderr=as_json)
    from shardwise.cli.progress import ProgressLine

    with ProgressLine() as progress:
        read = [_read(path, workers, progress) for path in paths]
        progress.say("comparing" if second is not None else "adding up")
        return _deliver(names, read, console, as_json=as_json, out=out)


def _labels(given: str | None, paths: Sequence[Path]) -> list[str]:
    if given is None:
        names = [
            path.resolve().name.removesuffix(".gz").removesuffix(".json").removesuffix(".pt.trace")
            for path in paths
        ]
        if len(set(names)) < len(names) or any(name == "traces" for name in names):
            names = [f"{path.resolve().parent.name}/{name}" for path, name in zip(paths, names, strict=True)]
        return (
            names
            if len(set(names)) == len(names)
            else [f"{name} ({side})" for name, side in zip(names, "AB", strict=False)]
        )
    names = [name.strip() for name in given.split(",")]
    if len(names) != len(paths) or not all(names) or len(set(names)) < len(names):
        raise OptionError(
            f"--labels {given[:80]}: give {len(paths)} different name{'s' * (len(paths) > 1)}, separated by commas."
        )
    return names


def _read(path: Path, workers: int | None, progress: "ProgressLine") -> "Sequence[Timeline]":
    from shardwise.profiles.ranks import read_ranks, trace_files

    files = trace_files(path)
    done = 0

    def on_read(_: Path) -> None:
        nonlocal done
        done += 1
        progress.advance(done, len(files), f"reading {path}")

    progress.say(f"reading {path}")
    return read_ranks(files, workers=workers, on_read=on_read)


def _deliver(
    names: list[str], read: "list[Sequence[Timeline]]", console: Console, *, as_json: bool, out: Path | None
) -> int:
    from shardwise.files.perfetto import perfetto_trace
    from shardwise.profiles.collectives import share
    from shardwise.profiles.diff import diff as compare
    from shardwise.profiles.picture import picture
    from shardwise.profiles.run import profile_run
    from shardwise.report.common.deliver import deliver

    shared = [share(timelines) for timelines in read]
    runs = [
        profile_run(name, timelines, sharing)
        for name, (timelines, sharing) in zip(names, shared, strict=True)
    ]
    both = compare(*runs) if len(runs) == 2 else None
    timelines = [timelines for timelines, _ in shared]
    traces: dict[str, str] = {}

    def beside() -> dict[str, bytes | str]:
        made: dict[str, bytes | str] = {}
        for side, name, each in zip("ab", names, timelines, strict=False):
            made[f"aligned-{side}.json.gz"] = perfetto_trace(each)
            traces[name] = f"aligned-{side}.json.gz"
        return made

    def page() -> dict[str, object]:
        drawn = (picture(name, each) for name, each in zip(names, timelines, strict=True))
        return {"pictures": [each for each in drawn if each is not None]}

    how = "json" if as_json else "terminal"
    deliver(both or runs[0], how, console, out, settings={"runs": names}, beside=beside, page=page)
    for name, trace in traces.items():
        assert out is not None
        told = f"All ranks of {name} on one clock, for ui.perfetto.dev: {out / trace}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    return 0
