"""The targets of launchers, one file each: a Job as a script or a manifest.

A target has START (what to type, with the file's name in place of {}), SUFFIX, and `text(job)`, which raises
OptionError for what it can't do without.
"""

import importlib
from typing import Protocol

from shardwise.core.launcher import Job

MARK = "Made by: "
"""Begins the first line that can be a comment, so that only files of ours are written over."""


class Target(Protocol):
    START: str
    SUFFIX: str

    def text(self, job: Job) -> str: ...


def target_named(name: str) -> Target:
    """One of core/launcher.py's TARGETS."""
    made: Target = importlib.import_module(f"{__name__}.{name}")
    return made
