"""The trace files of a run's ranks: found, read by a process each, and put on one origin of time."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import cpu_count
from pathlib import Path

from shardwise.core.errors import TraceError
from shardwise.core.timeline import Timeline
from shardwise.profiles.read import read_timeline
from shardwise.workers.processes import on_processes

_TRACES = re.compile(r"\.json(\.gz)?$|\.tmp$|\.pftrace$", re.IGNORECASE)
# a run's folder has these settings, and data beside its traces: predict's are one file for each plan's step
_SETTINGS = "settings.json"
_STEP = re.compile(r"timeline-\w+\.json\.gz$")
_PREDICTED = re.compile(r"(?:step|timeline)-(\w+)\.json(?:\.gz)?$")
TRACE_FOLDER = "traces"
MOST_FILES = 4096


def sides(path: Path) -> tuple[Path, ...]:
    """What a run's folder has of its two plans, in the order of their names; else the path itself."""
    plans = _plans(path)
    if path.is_dir() and not plans:
        plans = [each for each in _files(path, _STEP) if (path / _SETTINGS).exists()]
    return tuple(plans) if len(plans) == 2 else (path,)


def predicted_steps(path: Path) -> tuple[Path, ...]:
    """The files of predicted steps that a path means: of a folder of predict --out all of its plans'; of one
    of its files, that plan's. None: it is no prediction."""
    folder = path if path.is_dir() else path.parent
    if not (folder / _SETTINGS).exists():
        return ()
    found = tuple(sorted(folder.glob("step-*.json")))
    if path.is_dir() or path.name == "prediction.json":
        return found
    named = _PREDICTED.match(path.name)
    return tuple(each for each in found if named is not None and each.name == f"step-{named[1]}.json")


def _plans(path: Path) -> list[Path]:
    """The folders of a run's plans."""
    inner = path / TRACE_FOLDER
    return sorted(each for each in inner.iterdir() if each.is_dir()) if inner.is_dir() else []


def _files(folder: Path, is_trace: re.Pattern[str]) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_file() and is_trace.search(each.name))


def trace_files(path: Path) -> tuple[Path, ...]:
    """The file itself; or a folder's trace files, sorted; or those of its folder `traces`, and of the one
    plan in it; or the step that predict put into a run's folder. Raises TraceError where there are none, or
    several plans."""
    if not path.exists():
        raise TraceError(f"{path}: there is no such file or folder. Name a profile, or a folder of them.")
    if path.is_file():
        return (path,)
    inner = path / TRACE_FOLDER
    folder = inner if inner.is_dir() else path
    plans = _plans(path)
    if len(plans) == 1:
        folder, plans = plans[0], []
    is_trace = _STEP if (folder / _SETTINGS).exists() else _TRACES
    traces = _files(folder, is_trace)
    if is_trace is _STEP and len(traces) > 1:
        listed = ", ".join(each.name for each in traces)
        raise TraceError(f"{folder}: has a step of each plan, {listed}. Give one, such as {traces[0]}.")
    if not traces:
        hint = "Give a trace file, or a folder with one file per rank."
        if plans:
            names = ", ".join(each.name for each in plans)
            hint = f"It has the plans {names}: give one, such as {plans[0]}."
        raise TraceError(f"{folder}: no file in it ends in .json or .json.gz. {hint}")
    if len(traces) > MOST_FILES:
        raise TraceError(
            f"{folder}: has {len(traces):,} trace files; at most {MOST_FILES:,} are read. "
            "Give a folder with one file per rank."
        )
    return tuple(traces)


def read_ranks(
    files: Sequence[Path], *, workers: int | None = None, on_read: Callable[[Path], None] = lambda _: None
) -> tuple[Timeline, ...]:
    """A Timeline per file, by rank, on one origin. workers: how many processes read at once; by default as
    many as there are cores.

    Raises TraceError where a file can't be read, or where two files are of the same rank.
    """
    wanted = min(len(files), workers or cpu_count() or 1)
    if wanted <= 1:
        timelines = []
        for number, file in enumerate(files):
            timelines.append(read_timeline(file, rank=number))
            on_read(file)
    else:
        timelines = _read_at_once(files, wanted, on_read)
    by_rank: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    for file, timeline in zip(files, timelines, strict=True):
        by_rank[timeline.ranks].append(file)
    for ranks, same in by_rank.items():
        if len(same) > 1:
            raise TraceError(
                f"{same[0].parent}: {len(same)} files are of rank {ranks[0]}: "
                f"{', '.join(file.name for file in same[:4])}. "
                "Keep one file per rank; steps of one rank belong in one file."
            )
    first_ns = min(timeline.origin_ns for timeline in timelines)
    placed = [
        replace(timeline.shifted(timeline.origin_ns - first_ns), origin_ns=first_ns) for timeline in timelines
    ]
    return tuple(sorted(placed, key=lambda timeline: timeline.ranks))


def _read_at_once(files: Sequence[Path], workers: int, on_read: Callable[[Path], None]) -> list[Timeline]:
    killed = (
        "a process that read a trace was killed: out of memory? Read fewer ranks at once with --workers 1."
    )
    by_number: dict[int, Timeline] = {}
    for number, timeline in on_processes(_read_one, enumerate(files), workers, killed):
        by_number[number] = timeline
        on_read(files[number])
    return [by_number[number] for number in range(len(files))]


def _read_one(numbered: tuple[int, Path]) -> tuple[int, Timeline]:
    number, file = numbered
    return number, read_timeline(file, rank=number)
