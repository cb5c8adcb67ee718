"""diff: the profiles of all ranks of one run -> RunProfile; of two -> Difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shardwise.core.difference import Difference, RunProfile, StepPicture
from shardwise.core.errors import OptionError
from shardwise.core.option import Option, check_options
from shardwise.core.timeline import Timeline
from shardwise.verbs.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """What only diff knows."""

    labels: Annotated[str | None, Option("What to call them, comma-separated.", shown="the files' names")] = (
        None
    )
    workers: Annotated[
        int | None, Option("Files read at once; each takes some memory.", least=1, shown="as many as cores")
    ] = None

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class Diffed:
    """Of one run or two. timelines: of all ranks on one clock, run by run."""

    answer: RunProfile | Difference
    runs: tuple[RunProfile, ...]
    timelines: tuple[tuple[Timeline, ...], ...]

    def pictures(self) -> list[StepPicture]:
        """A step of each run, as far as there is one to draw."""
        from shardwise.profiles.picture import picture

        drawn = [picture(run.label, each) for run, each in zip(self.runs, self.timelines, strict=True)]
        return [each for each in drawn if each is not None]


def diff(
    first: Path | str,
    second: Path | str | None = None,
    options: DiffOptions | None = None,
    progress: Progress = silent,
) -> Diffed:
    """Trace files, folders with one per rank, or run folders of compare --profile or predict --out; of one
    run of two plans these are compared. Raises InputError for what can't be read."""
    from shardwise.profiles.collectives import share
    from shardwise.profiles.diff import diff as between
    from shardwise.profiles.ranks import sides
    from shardwise.profiles.run import profile_run

    options = options or DiffOptions()
    paths = [Path(first), Path(second)] if second is not None else list(sides(Path(first)))
    labels = _labels(options.labels, paths)
    read = [_read(path, options.workers, progress) for path in paths]
    progress("comparing" if len(paths) > 1 else "adding up")
    shared = [share(timelines) for timelines in read]
    runs = tuple(profile_run(label, *each) for label, each in zip(labels, shared, strict=True))
    answer = between(*runs) if len(runs) > 1 else runs[0]
    return Diffed(answer, runs, tuple(timelines for timelines, _ in shared))


def _labels(given: str | None, paths: Sequence[Path]) -> list[str]:
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(paths) or not all(names) or len(set(names)) < len(names):
            raise OptionError(
                f"--labels {given[:80]}: give {len(paths)} different name{'s' * (len(paths) > 1)}, "
                "separated by commas."
            )
        return names
    whole = [path.resolve() for path in paths]
    names = [path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".pt.trace") for path in whole]
    if len(set(names)) < len(names) or "traces" in names:
        names = [f"{path.parent.name}/{name}" for path, name in zip(whole, names, strict=True)]
    if len(set(names)) < len(names):
        return [f"{name} ({side})" for name, side in zip(names, "AB", strict=False)]
    return names


def _read(path: Path, workers: int | None, progress: Progress) -> Sequence[Timeline]:
    from shardwise.profiles.ranks import read_ranks, trace_files

    files = trace_files(path)
    done = 0

    def on_read(_: Path) -> None:
        nonlocal done
        done += 1
        progress(f"reading {path}", done, len(files))

    progress(f"reading {path}")
    return read_ranks(files, workers=workers, on_read=on_read)
