"""The proof of every Hugging Face type's own plan as data, its file, and the tables of docs/verify.md. No
torch, no processes."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.hf_results import cell, table
from benchmarks.results import RESULTS, latest, write_results
from shardwise.core.verification import Verdict, Verification, VerificationRun
from shardwise.files.document import read_document, write_document
from shardwise.report.verify import rows
from shardwise.report.verify.tables import cases_table

WHAT = "hf-verify"


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


def newest_sweep(folder: Path = RESULTS) -> Sweep:
    """Raises FileNotFoundError where there is none."""
    path = latest(WHAT, folder)
    return read_document(path.read_bytes(), Sweep, str(path), saved=("verify", "sweep"))


def summary(sweep: Sweep) -> str:
    """Counts in a sentence or two."""
    cases = sweep.run.verifications
    skipped = [each for each in cases if each.verdict is Verdict.SKIPPED]
    return (
        f"{len(cases) - len(skipped)} causal language model types of transformers "
        f"{dict(sweep.run.versions)['transformers']} have a tensor-parallel plan of their own and run: "
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
    return {
        f"benchmark-{WHAT}": summary(sweep) + "\n\n" + _found_table(wrong) + source,
        f"benchmark-{WHAT}-all": _all_table(run.verifications) + source,
        f"benchmark-{WHAT}-skipped": _skipped_table(
            [each for each in run.verifications if each.verdict is Verdict.SKIPPED]
        )
        + source,
    }


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
