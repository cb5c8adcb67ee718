"""What `compare --profile` makes of its ranks' traces: where each plan's step went, and a page for each plan beside the first."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.core.measurement import StepProfile

if TYPE_CHECKING:
    from shardwise.core.difference import RunProfile, StepPicture


def profiled_plans(
    labels: Sequence[str], traces: Path, say: Callable[[str], None]
) -> tuple[tuple[StepProfile, ...], dict[str, str]]:
    """(of each plan, {file name: page}). Raises TraceError where a trace can't be read."""
    from shardwise.profiles.collectives import share
    from shardwise.profiles.diff import diff, run_words
    from shardwise.profiles.picture import picture
    from shardwise.profiles.ranks import read_ranks, trace_files
    from shardwise.profiles.run import profile_run
    from shardwise.report.diff.html import difference_html, run_html
    from shardwise.verbs.compare_ranks import folder_name

    runs: list[RunProfile] = []
    pictures: list[list[StepPicture]] = []
    for label in labels:
        say(f"reading the profiles of {label}")
        timelines, sharing = share(read_ranks(trace_files(traces / folder_name(label))))
        runs.append(profile_run(label, timelines, sharing))
        drawn = picture(label, timelines)
        pictures.append([drawn] if drawn is not None else [])
    found = tuple(
        StepProfile(
            label=run.label,
            steps=len({step.step for step in run.steps}),
            parts=run.parts,
            communication_ns=run.communication_ns,
            overlap_ns=run.overlap_ns,
            words=run_words(run),
            traces=str(traces / folder_name(run.label)),
        )
        for run in runs
    )
    pages = {f"profile-{folder_name(labels[0])}.html": run_html(runs[0], pictures[0])}
    for run, drawings in zip(runs[1:], pictures[1:], strict=True):
        pages[f"diff-{folder_name(run.label)}.html"] = difference_html(
            diff(runs[0], run), pictures[0] + drawings
        )
    return found, pages
