"""What predict got wrong, and why: a history that outlives the results that it is about.

benchmarks/data/causes.json has an entry for each cause that was found: title, rows (what their columns must
be), cause, mend (null: none yet), before and after: results files, of the last run with the mistake and of
the first without it. Errors are those files', computed here; what the same rows are off by in the newest run
stands beside them, so that a mend that is lost is seen. Entries are added, never taken away.

No torch, no processes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.hf_results import table
from benchmarks.published_results import Predicted, Published, newest_run, quantile
from benchmarks.results import RESULTS

WHAT = "published-causes"
CAUSES = Path(__file__).parent / "data" / "causes.json"
KEYS = {"title", "rows", "cause", "mend", "before", "after"}
COUNTS = ("tp", "pp", "cp", "ep")  # "1" or "> 1"
BEGIN = ("precision", "recompute", "gpu")  # what the column begins with


class CauseError(Exception):
    """causes.json that can't be read, or a results file that it names and that isn't there."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One entry. after: None while it is open."""

    title: str
    rows: tuple[tuple[str, str], ...]
    cause: str
    mend: str | None
    before: str
    after: str | None

    def holds(self, row: Predicted) -> bool:
        return all(_is(row, key, wanted) for key, wanted in self.rows)


def _is(row: Predicted, key: str, wanted: str) -> bool:
    if key in COUNTS:
        return (int(getattr(row, key)) > 1) == (wanted == "> 1")
    if key in BEGIN:
        return str(getattr(row, key)).startswith(wanted)
    return bool(getattr(row, key) == wanted)


def causes(path: Path = CAUSES) -> list[Cause]:
    """In the file's order. Raises CauseError."""
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        if not isinstance(entry, dict) or set(entry) != KEYS:
            raise CauseError(f"{path.name}: an entry needs exactly {', '.join(sorted(KEYS))}.")
        wrong = set(entry["rows"]) - {*COUNTS, *BEGIN, "group", "model"}
        if wrong:
            raise CauseError(f'{path.name}: "{entry["title"]}" asks rows for {", ".join(sorted(wrong))}.')
        rows = tuple(sorted(entry.pop("rows").items()))
        found.append(Cause(rows=rows, **entry))
    return found


def _run(name: str, folder: Path) -> Published:
    path = folder / name
    if not path.is_file():
        raise CauseError(f"causes.json names {name}, which isn't in {folder.name}: its errors would be lost.")
    return msgspec.json.decode(path.read_bytes(), type=Published)


def errors(cause: Cause, run: Published) -> str:
    """`-14.8 %, 14.8 %, 37.7 %`: median signed, median absolute, 90 % within."""
    found = [row.error for row in run.rows if cause.holds(row)]
    if not found:
        return "no such row"
    absolute = [abs(error) for error in found]
    shares = (median(absolute), quantile(absolute, 0.9))
    return f"{median(found) * 100:+.1f} %, " + ", ".join(f"{share * 100:.1f} %" for share in shares)


def causes_table(known: Sequence[Cause], newest: Published, folder: Path = RESULTS) -> str:
    lines = []
    for cause in known:
        count = sum(cause.holds(row) for row in newest.rows)
        rows = ", ".join(f"{key} {value}" for key, value in cause.rows)
        mend = f"*Mended:* {cause.mend}." if cause.mend else "**Open.**"
        after = errors(cause, _run(cause.after, folder)) if cause.after else "–"
        lines.append(
            [
                f"**{cause.title}.** {cause.cause}. {mend}",
                f"{rows}: {count}",
                f"{errors(cause, _run(cause.before, folder))} ({cause.before[:10]})",
                f"{after} ({cause.after[:10]})" if cause.after else after,
                errors(cause, newest),
            ]
        )
    head = ["what, why, and the mend", "rows", "before", "after", "now"]
    return table(head, lines)


def blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    run = newest_run(folder)
    source = (
        "\nSource: `benchmarks/data/causes.json` and the results files of `python -m benchmarks.published`.\n"
    )
    return {f"benchmark-{WHAT}": causes_table(causes(), run, folder) + source}
