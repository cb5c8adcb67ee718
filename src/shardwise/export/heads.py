"""The comments at the head of a file: the command that made it, and what it leaves out."""

from collections.abc import Iterator, Sequence

from shardwise.core.export import LeftOut
from shardwise.core.shown import shown
from shardwise.export.job import Job

MARK = "Made by: "
"""Begins the first line of every file, so that only files of ours are written over."""


def head(job: Job, left_out: Sequence[LeftOut] = (), run: str = "") -> Iterator[str]:
    """Lines of comments, without their marks."""
    yield f"{MARK}{job.command}"
    for each in left_out:
        yield f"Left out: {shown(each.asked, 200)} (here: {shown(each.instead, 200)}): {shown(each.why, 300)}"
    if run:
        yield f"Run: {run}"


def doc(job: Job, how: str) -> str:
    """The docstring's line."""
    return f"The model sharded over {job.mesh}, {how}."
