"""What verify --static said beside what the proof found, as data, its file, and the table of docs/verify.md.
No torch, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, Saved, newest
from shardwise.core.verification import Verdict

WHAT = "static-suspicions"
NO = frozenset({Verdict.WRONG, Verdict.CRASHES, Verdict.NEARLY_NOTHING})


@dataclass(frozen=True, slots=True)
class Row:
    """One model under one plan. group: which table of models it is of. proved: the verdict of the proof, or
    of the plain script; static: that of the static checks, and said: what they found, in words. seconds: of
    these."""

    group: str
    name: str
    proved: str
    static: str
    said: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """By the proof; what shards nearly nothing is right too."""
        return self.proved in (Verdict.RIGHT, Verdict.NEARLY_NOTHING)

    @property
    def is_faulty(self) -> bool:
        return self.proved in (Verdict.WRONG, Verdict.CRASHES)

    @property
    def is_suspected(self) -> bool:
        return self.static in (Verdict.SUSPECTED, Verdict.CRASHES)

    @property
    def is_defect(self) -> bool:
        return self.is_right and self.is_suspected


@dataclass(frozen=True, slots=True)
class Run(Saved):
    command: str
    started: str
    seconds: float
    versions: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_run(folder: Path = RESULTS) -> Run:
    """Raises FileNotFoundError where there is none."""
    return newest(Run, WHAT, folder)


def newest_blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Those of the newest run; none where there is no run yet."""
    try:
        return blocks(newest_run(folder))
    except FileNotFoundError:
        return {}


def summary(run: Run) -> str:
    """Counts in a sentence or two."""
    right, faulty = ([each for each in run.rows if is_so(each)] for is_so in (_is_right, _is_faulty))
    return (
        f"Of {len(right)} models that the proof finds right, the static checks suspect "
        f"{sum(each.is_suspected for each in right)}; of {len(faulty)} that it finds wrong, or that crash, "
        f"{sum(each.is_suspected for each in faulty)}. A model takes {_median(run.rows):.1f} s (median)."
    )


def _is_right(row: Row) -> bool:
    return row.is_right


def _is_faulty(row: Row) -> bool:
    return row.is_faulty


def _median(rows: Sequence[Row]) -> float:
    return sorted(row.seconds for row in rows)[len(rows) // 2]


def blocks(run: Run) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    source = f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    cells = []
    for group in dict.fromkeys(row.group for row in run.rows):
        rows = [row for row in run.rows if row.group == group]
        right, faulty = ([row for row in rows if is_so(row)] for is_so in (_is_right, _is_faulty))
        of_right = (len(right), sum(row.is_defect for row in right))
        of_faulty = (len(faulty), sum(row.is_suspected for row in faulty))
        cells.append([group, *map(str, (*of_right, *of_faulty))])
    head = ["models", "right", "of these suspected", "wrong, or crash", "of these suspected"]
    text = f"{summary(run)}\n\n{table(head, cells, numbers=(1, 2, 3, 4))}"
    defects = [[row.group, row.name, cell(row.said)] for row in run.rows if row.is_defect]
    if defects:
        text += "\nSuspected, and right:\n\n" + table(["models", "which", "in words"], defects)
    return {f"benchmark-{WHAT}": text + source}
