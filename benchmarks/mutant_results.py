"""What verify said of each mutant as data, its file, and its table in docs/verify.md. No torch, no
processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, Saved, newest

WHAT = "verify-mutants"


@dataclass(frozen=True, slots=True)
class Row:
    """One mutant. is_harmful: by the plain script. reasons: the causes that verify named; said: its finding
    in words; is_place_said: whether they name the axis or the module that they should."""

    name: str
    about: str
    expected: str
    is_harmful: bool
    verdict: str
    reasons: tuple[str, ...]
    said: str
    mesh: str = "tp=2"
    is_place_said: bool = True

    @property
    def is_caught(self) -> bool:
        return self.verdict in ("wrong", "crashes")

    @property
    def is_judged_right(self) -> bool:
        return self.is_caught == self.is_harmful and self.verdict != "skipped"

    @property
    def is_reason_right(self) -> bool:
        return not self.is_harmful or (self.expected in self.reasons and self.is_place_said)


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


def summary(run: Run) -> str:
    """Counts in a sentence or two."""
    harmful = [row for row in run.rows if row.is_harmful]
    harmless = [row for row in run.rows if not row.is_harmful]
    right = sum(row.is_reason_right for row in harmful)
    count = len(_meshes(run))
    meshes = f"{count} meshes" if count > 1 else f"mesh {run.rows[0].mesh}"
    return (
        f"Of {len(run.rows)} mutants on {meshes} {len(harmful)} are harmful: verify catches "
        f"{sum(row.is_caught for row in harmful)} of them, and for the reason that was written down before "
        f"in {right} ({right / max(1, len(harmful)):.0%}). Of the {len(harmless)} harmless ones it flags "
        f"{sum(row.is_caught for row in harmless)}. All in {run.seconds:.0f} s."
    )


def _meshes(run: Run) -> list[str]:
    return list(dict.fromkeys(row.mesh for row in run.rows))


def _counts(name: str, rows: Sequence[Row]) -> list[str]:
    judged = [row for row in rows if row.is_judged_right]
    return [name, str(len(rows)), str(len(judged)), str(sum(row.is_reason_right for row in judged))]


def blocks(run: Run) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    source = f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    kinds = dict.fromkeys(row.expected for row in run.rows)
    by_kind = [
        _counts(kind.replace("_", " "), [row for row in run.rows if row.expected == kind]) for kind in kinds
    ]
    by_mesh = [_counts(mesh, [row for row in run.rows if row.mesh == mesh]) for mesh in _meshes(run)]
    missed = [
        [
            row.name,
            cell(row.about),
            row.expected.replace("_", " "),
            ", ".join(row.reasons).replace("_", " ") or row.verdict,
            cell(row.said),
        ]
        for row in run.rows
        if not (row.is_judged_right and row.is_reason_right)
    ]
    columns = ["mutants", "judged right", "reason right"]
    text = f"{summary(run)}\n\n{table(['expected', *columns], by_kind, numbers=(1, 2, 3))}"
    text += f"\n{table(['mesh', *columns], by_mesh, numbers=(1, 2, 3))}"
    if missed:
        text += "\nMisjudged, or for another reason:\n\n" + table(
            ["mutant", "what it does", "expected", "named", "in words"], missed
        )
    return {f"benchmark-{WHAT}": text + source}
