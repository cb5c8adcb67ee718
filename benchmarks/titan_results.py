"""What verify said of torchtitan's models as data, its file, and its table in docs/frameworks.md. No torch,
no processes."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, Saved, newest

WHAT = "titan"


@dataclass(frozen=True, slots=True)
class Row:
    """One model under one backend. verdict, why: as verify says them. error: of the worst gradient, relative.
    seconds: of this case, without the launch."""

    model: str
    backend: str
    sequence_parallel: bool
    expert_parallel: int
    verdict: str
    why: str
    error: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Run(Saved):
    """seconds: of all, with the launch."""

    command: str
    started: str
    settings: str
    versions: tuple[tuple[str, str], ...]
    seconds: float
    rows: tuple[Row, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_run(folder: Path = RESULTS) -> Run:
    """Raises FileNotFoundError where there is none."""
    return newest(Run, WHAT, folder)


def blocks(run: Run) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions if name != "shardwise")
    source = (
        f"\nRun: {run.settings}; {versions}; {run.seconds:.0f} s in all.\nSource: "
        f"`benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    )
    return {f"benchmark-{WHAT}": _table(run) + source}


def newest_blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Of the newest file; none where there is none."""
    try:
        return blocks(newest_run(folder))
    except FileNotFoundError:
        return {}


def _table(run: Run) -> str:
    head = [
        "model", "backend", "sequence parallel", "expert parallel", "verdict", "worst gradient", "s", "why",
    ]  # fmt: skip
    rows = [
        [
            row.model,
            f"`{row.backend}`",
            "yes" if row.sequence_parallel else "no",
            str(row.expert_parallel) if row.expert_parallel > 1 else "",
            row.verdict,
            f"{row.error:.1e}" if row.error is not None else "",
            f"{row.seconds:.1f}",
            cell(row.why),
        ]
        for row in run.rows
    ]
    return table(head, rows, numbers=(6,))
