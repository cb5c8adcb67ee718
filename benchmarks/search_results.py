"""Searches' times as data: their file, and the table of the documents. No torch, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, Saved, newest
from shardwise.report.common.units import format_bytes, format_seconds

WHAT = "search-speed"
MEMORY_BAR = int(1.5 * 2**30)


@dataclass(frozen=True, slots=True)
class SearchRun:
    """bar_s: seconds that were asked for. gap: how much better than the best something else could be, at
    most, as a share; None, as step_s is, where nothing was found in time. largest_bytes: of the largest
    command process up to here. At the peak of all its processes, those that trace among them: all_bytes, each
    page that several share counted once, and largest_process_bytes, of the one that holds most (0: not
    measured)."""

    name: str
    command: str
    seconds: float
    bar_s: float | None
    candidates: int
    traces: int
    predicted: int
    gap: float | None
    step_s: float | None
    largest_bytes: int
    all_bytes: int = 0
    largest_process_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SearchSpeed(Saved):
    command: str
    started: str
    seconds: float
    runs: tuple[SearchRun, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Of the newest file; none where there is none."""
    try:
        found = newest(SearchSpeed, WHAT, folder)
    except FileNotFoundError:
        return {}
    source = f"Source: the newest file of `{WHAT}`, made by `{found.command}`."
    return {f"benchmark-{WHAT}": f"{told(found.runs)}\n{source}\n"}


def told(runs: Sequence[SearchRun]) -> str:
    """A table in Markdown."""
    head = ["search", "took", "bar", "candidates", "traces", "gap", "best step", "its own process"]
    is_measured = any(run.all_bytes for run in runs)
    head += [f"all processes (bar: {format_bytes(MEMORY_BAR)})", "the largest"] if is_measured else []
    rows = [
        [
            cell(run.name),
            f"{run.seconds:.1f} s",
            "" if run.bar_s is None else f"{run.bar_s:g} s{'' if run.seconds <= run.bar_s else ', missed'}",
            f"{run.candidates:,}",
            f"{run.traces:,}",
            "unknown" if run.gap is None else "proved" if run.gap == 0 else f"{run.gap:.0%}",
            "none in time" if run.step_s is None else format_seconds(run.step_s),
            format_bytes(run.largest_bytes),
            *(_memory(run) if is_measured else ()),
        ]
        for run in runs
    ]
    return table(head, rows, tuple(range(1, len(head))))


def _memory(run: SearchRun) -> tuple[str, str]:
    missed = "" if run.all_bytes <= MEMORY_BAR else ", missed"
    return f"{format_bytes(run.all_bytes)}{missed}", format_bytes(run.largest_process_bytes)
