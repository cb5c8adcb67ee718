"""What others published as their best configuration, beside what a search picks, as data: their file, and the
table of docs/search.md. No torch, no processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import published_results
from benchmarks.hf_results import cell, table
from benchmarks.published_results import Predicted
from benchmarks.results import RESULTS, Saved, newest
from shardwise.report.common.units import format_bytes, format_seconds

WHAT = "published-best"
APART = 0.1
"""From this difference of two predicted steps on, a reason is given."""
_TERMS, _LEAST = 2, 0.1


@dataclass(frozen=True, slots=True)
class Pick:
    """The best that a search found. terms: (name, seconds), adding up to step_s. gap: how much faster
    something else of its space could be at most, as a share; infinite where that isn't known."""

    label: str
    step_s: float
    device_bytes: float
    terms: tuple[tuple[str, float], ...]
    gap: float


@dataclass(frozen=True, slots=True)
class Row:
    """One published configuration. theirs: in words, as published, and their_pick: the best that is left with
    its degrees and its micro-batch; None where nothing is, and why_not says so. measured: what they say of
    it, with its unit. command: of the search."""

    name: str
    source: str
    theirs: str
    measured: str
    command: str
    our_pick: Pick | None
    their_pick: Pick | None
    why_not: str

    @property
    def ratio(self) -> float | None:
        """Of predicted steps, theirs over ours."""
        if self.their_pick is None or self.our_pick is None:
            return None
        return self.their_pick.step_s / self.our_pick.step_s


@dataclass(frozen=True, slots=True)
class Run(Saved):
    command: str
    started: str
    seconds_each: float
    rows: tuple[Row, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_blocks(folder: Path = RESULTS) -> dict[str, str]:
    """Of the newest file; none where there is none."""
    try:
        run = newest(Run, WHAT, folder)
    except FileNotFoundError:
        return {}
    source = (
        f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`: each search was "
        f"given {run.seconds_each:g} s."
    )
    published = published_results.newest_run()
    source += f" As run: `benchmarks/results/{published.day}-{published.what}.json`."
    return {f"benchmark-{WHAT}": f"{told(run, published.rows)}{source}\n"}


def told(run: Run, published: Sequence[Predicted] = ()) -> str:
    """published: rows as they were run, by benchmarks/published.py; where one has a measured step, its
    prediction stands beside it."""
    head = ["", "their best", "measured", "predicted as run", "predicted in our space"]
    head += ["our pick", "predicted", "theirs over ours", "our gap"]
    rows = [
        [
            cell(row.name),
            cell(row.theirs),
            row.measured,
            _as_run(row, published),
            format_seconds(row.their_pick.step_s) if row.their_pick is not None else "doesn't fit",
            cell(row.our_pick.label) if row.our_pick is not None else "none in time",
            format_seconds(row.our_pick.step_s) if row.our_pick is not None else "",
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            _gap(row.our_pick) if row.our_pick is not None else "",
        ]
        for row in run.rows
    ]
    reasons = "".join(f"- {line}\n" for row in run.rows for line in reason(row))
    return f"{table(head, rows, numbers=(3, 4, 6, 7, 8))}\n{reasons}\n{_sources(run)}\n"


def reason(row: Row) -> Iterator[str]:
    """In what the two differ, where they are APART or more."""
    ours, theirs = row.our_pick, row.their_pick
    if theirs is None:
        yield f"**{cell(row.name)}**: theirs can't be by our prediction: {cell(row.why_not)}"
        return
    if ours is None:
        yield (
            f"**{cell(row.name)}**: our search had found nothing when its time was over: the space is large, "
            "and each piece of such a model takes seconds to trace."
        )
        return
    more_s = theirs.step_s - ours.step_s
    if abs(more_s) < APART * ours.step_s:
        return
    known = dict(ours.terms)
    apart = [(term, seconds - known.get(term, 0.0)) for term, seconds in theirs.terms]
    ordered = sorted(apart, key=lambda pair: -pair[1] if more_s > 0 else pair[1])[:_TERMS]
    named = [
        f"{format_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} {term}"
        for term, seconds in ordered
        if abs(seconds) >= _LEAST * abs(more_s)
    ]
    percent = f"{100 * abs(more_s) / ours.step_s:.0f} %"
    which = "longer" if more_s > 0 else "shorter: our search hadn't come to it when its time was over"
    yield (
        f"**{cell(row.name)}**: by our prediction theirs takes {percent} {which} "
        f"({', '.join(named)}), with {format_bytes(theirs.device_bytes)} of a device where our pick has "
        f"{format_bytes(ours.device_bytes)}."
    )


def _as_run(row: Row, published: Sequence[Predicted]) -> str:
    """Of the published row with the same GPUs and measured step, from the same source's table."""
    found = {
        format_seconds(each.predicted_s)
        for each in published
        if f"{each.measured_s:.2f} s" == row.measured and f" {each.gpus} " in row.name
    }
    return found.pop() if len(found) == 1 else ""


def _gap(pick: Pick) -> str:
    if pick.gap == 0:
        return "proved"
    return f"{pick.gap:.0%}" if pick.gap < float("inf") else "unknown"


def _sources(run: Run) -> str:
    names: dict[str, list[str]] = {}
    for row in run.rows:
        names.setdefault(row.source, []).append(row.name)
    return (
        "Their figures: " + "; ".join(f"{', '.join(each)}: {source}" for source, each in names.items()) + "."
    )
