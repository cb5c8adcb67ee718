"""The proof of every Hugging Face type's own plans as data, its files, and the tables of docs/verify.md and
docs/hugging-face-plans.md. No torch, no processes."""

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, latest, write_results
from shardwise.core.verification import Verdict, Verification, VerificationRun
from shardwise.files.document import read_document, write_document
from shardwise.report.verify import rows
from shardwise.report.verify.tables import cases_table

WHAT = "hf-verify"
WHATS = {"hf": WHAT, "hf-ep": "hf-ep-verify"}
"""Plan -> what its file is called. With another transformers than CI's, its version follows."""
_CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def what_of(plan: str, transformers: str) -> str:
    """transformers: its version."""
    tested = re.search(r"^transformers==(.+)$", _CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    major_minor = transformers.split(".")[:2]
    is_tested = tested is not None and tested[1].split(".")[:2] == major_minor
    return "-".join([WHATS[plan], *([] if is_tested else major_minor)])


def whats(folder: Path = RESULTS) -> tuple[str, ...]:
    """Those that have a file."""
    names = {path.stem[len("2026-01-01-") :] for path in folder.glob("????-??-??-*.json")}
    return tuple(sorted(name for name in names if name.startswith(tuple(WHATS.values()))))


@dataclass(frozen=True, slots=True)
class Sweep:
    """A run over types; those without a plan of their own are in `without_plan`."""

    command: str
    seconds: float
    run: VerificationRun
    without_plan: tuple[str, ...]
    what: str = WHAT
    schema_version: int = 1

    @property
    def day(self) -> str:
        return self.run.started[:10]

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this run; one of the same day is replaced."""
        return write_results(write_document(self), self.day, self.what, folder)


def newest_sweep(what: str = WHAT, folder: Path = RESULTS) -> Sweep:
    """Raises FileNotFoundError where there is none."""
    path = latest(what, folder)
    return read_document(path.read_bytes(), Sweep, str(path), saved=("verify", "sweep"))


def summary(sweep: Sweep) -> str:
    """Counts in a sentence or two."""
    cases = sweep.run.verifications
    skipped = [each for each in cases if each.verdict is Verdict.SKIPPED]
    return (
        f"{len(cases) - len(skipped)} causal language model types of transformers "
        f"{dict(sweep.run.versions)['transformers']} have {_kind(sweep.what)} plan of their own and run: "
        f"{rows.totals(sweep.run)}. Of the skipped ones not even the unsharded model runs as transformers' "
        f"default configuration describes it; {len(sweep.without_plan)} more types have no plan. All in "
        f"{sweep.seconds / 60:.1f} minutes."
    )


def blocks(sweep: Sweep) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    run = sweep.run
    versions = ", ".join(f"{name} {version}" for name, version in run.versions if name != "shardwise")
    source = (
        f"\nRun: {rows.settings(run)}; {versions}.\nSource: "
        f"`benchmarks/results/{sweep.day}-{sweep.what}.json`, made by `{sweep.command}`.\n"
    )
    wrong = [each for each in run.verifications if each.verdict.is_no]
    what = sweep.what
    return {
        f"benchmark-{what}": summary(sweep) + "\n\n" + _found_table(wrong) + source,
        f"benchmark-{what}-all": _all_table(run.verifications) + source,
        f"benchmark-{what}-skipped": _skipped_table(
            [each for each in run.verifications if each.verdict is Verdict.SKIPPED]
        )
        + source,
    }


def _kind(what: str) -> str:
    plan = next(plan for plan, name in WHATS.items() if re.fullmatch(rf"{name}(-\d+)*", what))
    return {"hf": "a tensor-parallel", "hf-ep": "an expert-parallel"}[plan]


def _found_table(cases: list[Verification]) -> str:
    order = (Verdict.WRONG, Verdict.CRASHES, Verdict.NEARLY_NOTHING)
    cells = [
        [_type(each), str(each.verdict), cell(rows.headline(each))]
        for each in sorted(cases, key=lambda each: order.index(each.verdict))
    ]
    return table(["type", "verdict", "what was found"], cells)


def _all_table(cases: tuple[Verification, ...]) -> str:
    shown = cases_table(cases)
    _, _, _, sharded, error, compared, _ = shown.columns
    cells = []
    for each, row in zip(cases, shown.rows, strict=True):
        if each.verdict is not Verdict.SKIPPED:
            texts = [
                row.cells[shown.columns.index(column)].read(column) for column in (sharded, compared, error)
            ]
            noise = rows.error(each.proof.noise) if each.proof is not None else ""
            steps = rows.error(each.proof.weights_error) if each.proof is not None else ""
            cells.append([_type(each), str(each.verdict), texts[0], texts[1], noise, texts[2], steps])
    head = [
        "type",
        "verdict",
        "sharded outside embedding and head",
        "gradients compared",
        "own noise",
        "largest error",
        "weights after 2 steps",
    ]
    return table(head, cells, numbers=(2, 4, 5, 6))


def _skipped_table(cases: list[Verification]) -> str:
    return table(["type", "why"], [[_type(each), cell(each.note)] for each in cases])


def _type(each: Verification) -> str:
    return each.model.removeprefix("hf:")
