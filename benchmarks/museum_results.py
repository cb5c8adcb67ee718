"""What verify said of the museum's exhibits as data, its file, and its table in docs/museum.md. No torch, no
processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, Saved, newest

WHAT = "museum"
GITHUB = "https://github.com"


@dataclass(frozen=True, slots=True)
class Shown:
    """What 200 training steps showed, as museum/judge.py measures it: see its Curve."""

    largest: float
    lasting: float
    seeds: float
    is_noticed: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One exhibit. wrong, reason: as it says itself. is_wrong, is_after_right: by the plain script. said:
    verify's first finding in words; said_of_after: what it finds of the mended one. curve: None where it
    raises, or wasn't asked for."""

    number: int
    title: str
    sources: tuple[str, ...]
    symptom: str
    axis: str
    kind: str
    wrong: str
    reason: str
    is_wrong: bool
    is_after_right: bool
    is_found: bool
    is_named: bool
    is_reason_right: bool
    said: str
    said_of_after: str
    seconds: float
    curve: Shown | None = None


@dataclass(frozen=True, slots=True)
class Run(Saved):
    command: str
    started: str
    versions: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_run(folder: Path = RESULTS) -> Run:
    """Raises FileNotFoundError where there is none."""
    return newest(Run, WHAT, folder)


def summary(run: Run) -> str:
    """Counts in a sentence or two."""
    rows = run.rows
    n = len(rows)
    right = sum(row.is_named and row.is_reason_right for row in rows)
    flagged = sum(bool(row.said_of_after) for row in rows)
    shown = [row.curve for row in rows if row.curve is not None]
    noticed = sum(curve.is_noticed for curve in shown)
    median = sorted(row.seconds for row in rows)[n // 2] if rows else 0.0
    text = (
        f"Of {n} exhibits verify finds {sum(row.is_found for row in rows)}, and names what is wrong, and "
        f"why, in {right} ({right / max(1, n):.0%}), each in {median:.1f} s (median). Of the {n} mended ones "
        f"it flags {flagged}."
    )
    if shown:
        text += (
            f" Of the {len(shown)} that don't raise a loss curve over 200 steps would have shown {noticed}: "
            "the mean loss of the last 50 steps is further from one process's than twice what other first "
            "weights make of it."
        )
    return text


def _source(name: str) -> str:
    repository, _, number = name.partition("#")
    return f"[{name}]({GITHUB}/{repository}/issues/{number})" if number else cell(name)


def _named(row: Row) -> str:
    if not row.is_found:
        return "no"
    if row.is_named and row.is_reason_right:
        return "what and why"
    return "what" if row.is_named else "why" if row.is_reason_right else "no"


def _curve(curve: Shown | None) -> str:
    if curve is None:
        return "raises"
    how = "noticed" if curve.is_noticed else "not noticed"
    return f"{how}: {curve.lasting:+.1%} at the end, at most {curve.largest:.1%}"


def _table(rows: Sequence[Row]) -> str:
    cells = [
        [
            str(row.number),
            cell(row.title),
            ", ".join(map(_source, row.sources)),
            row.axis,
            "yes" if row.is_found else "**no**",
            _named(row),
            cell(row.said),
            f"{row.seconds:.1f}",
            _curve(row.curve),
        ]
        for row in rows
    ]
    head = ["", "fault", "reported in", "axis", "found", "named", "what verify says", "s", "loss curve"]
    return table(head, cells, numbers=(0, 7))


def blocks(run: Run) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    source = (
        f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`; "
        + ", ".join(f"{name} {version}" for name, version in run.versions if name != "shardwise")
        + ".\n"
    )
    symptoms = [[str(row.number), cell(row.title), cell(row.symptom)] for row in run.rows]
    return {
        f"benchmark-{WHAT}": f"{summary(run)}\n\n{_table(run.rows)}{source}",
        f"benchmark-{WHAT}-symptoms": table(["", "fault", "as it was reported"], symptoms, numbers=(0,)),
        f"benchmark-{WHAT}-summary": f"{summary(run)}\n",
    }
