"""The proof of the plans that Shardwise makes, for every Hugging Face type, as data, its file, and the tables
of docs/made-plans.md. No torch, no processes."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, latest, write_results
from shardwise.core.verification import Verdict
from shardwise.files.document import read_document, write_document
from shardwise.report.common.units import format_share

WHAT = "made-plans"
SIZES = (2, 4)
WHATS = tuple(f"{WHAT}-tp{tp}" for tp in SIZES)


@dataclass(frozen=True, slots=True)
class Reason:
    """Parameters that are whole: their share of all, and why."""

    pattern: str
    share: float
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One type. is_planned: there is a plan that the engine takes. is_right: the proof found no difference.
    sharded: share of the default configuration's parameters of which a rank holds its part alone. sequence:
    from where to where it is cut; why_not: why it isn't. note: why there is no plan, or no proof."""

    model_type: str
    is_planned: bool = False
    verdict: str = ""
    is_right: bool = False
    headline: str = ""
    gradients: int = 0
    dtype: str = ""
    parameters: int = 0
    sharded: float = 0.0
    sequence: str | None = None
    why_not: str | None = None
    whole: tuple[Reason, ...] = ()
    note: str = ""

    @property
    def runs(self) -> bool:
        """Whether the unsharded model runs, so that there is something to prove."""
        return bool(self.verdict) and self.verdict != Verdict.SKIPPED


@dataclass(frozen=True, slots=True)
class MadePlans:
    """A run over types."""

    command: str
    seconds: float
    tp: int
    started: str
    versions: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    schema_version: int = 1

    @property
    def what(self) -> str:
        return f"{WHAT}-tp{self.tp}"

    @property
    def day(self) -> str:
        return self.started[:10]

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this run; one of the same day is replaced."""
        return write_results(write_document(self), self.day, self.what, folder)


def newest_run(tp: int, folder: Path = RESULTS) -> MadePlans:
    """Raises FileNotFoundError where there is none."""
    path = latest(f"{WHAT}-tp{tp}", folder)
    return read_document(path.read_bytes(), MadePlans, str(path), saved=("plan", "run"))


def summary(run: MadePlans) -> str:
    """Counts in a few sentences."""
    right = [row for row in run.rows if row.is_right]
    cut = [row for row in right if row.sequence is not None]
    most = [row for row in right if row.sharded >= 0.95]
    return (
        f"{len(right)} of transformers {dict(run.versions)['transformers']}'s {len(run.rows)} causal "
        f"language model types have a made plan that is proved right at tp={run.tp}: outputs, loss, every "
        f"gradient and two optimizer steps. {len(cut)} of them with sequence parallelism, {len(most)} with "
        f"95 % or more of their parameters sharded. In {run.seconds / 60:.0f} minutes."
    )


def blocks(run: MadePlans) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions if name != "shardwise")
    source = (
        f"\n{versions}.\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    )
    name = f"benchmark-{run.what}"
    others = [row for row in run.rows if not row.is_right]
    return {
        name: summary(run) + "\n" + source,
        f"{name}-right": _right_table([row for row in run.rows if row.is_right]) + source,
        f"{name}-others": _others_table(others) + source,
    }


def _right_table(rows: list[Row]) -> str:
    cells = [
        [
            row.model_type,
            format_share(row.sharded),
            str(row.gradients),
            row.dtype,
            "yes" if row.sequence is not None else cell(f"no: {row.why_not}"),
            cell(
                "; ".join(f"{each.pattern} ({format_share(each.share)}): {each.reason}" for each in row.whole)
            ),
        ]
        for row in rows
    ]
    head = ["type", "sharded", "gradients", "in", "sequence parallel", "whole, and why"]
    return table(head, cells, numbers=(1, 2))


def _others_table(rows: list[Row]) -> str:
    cells = [[row.model_type, row.verdict or "no plan", cell(row.headline or row.note)] for row in rows]
    return table(["type", "verdict", "why"], cells)
