"""What scripts of launchers have in common: words of a shell, one a line."""

import shlex
from collections.abc import Iterable, Iterator

from shardwise.core.launcher import Job
from shardwise.files.launchers import MARK


def head(job: Job) -> Iterator[str]:
    yield "#!/usr/bin/env bash"
    yield f"# {MARK}{job.made_by}"


def torchrun(job: Job, endpoint: str, run_id: str) -> Iterator[str]:
    """Each word of the command quoted; torchrun's own options, endpoint and run_id among them, are the
    script's."""
    words = job.torchrun(endpoint, run_id)
    own = words.index("-m")
    yield from words[:own]
    yield from map(shlex.quote, words[own:])


def quoted(job: Job) -> Iterator[str]:
    """What tells shellcheck that words which look as if they were to be expanded are meant as they are."""
    words = (*job.words, job.image or "", *(f"{each.source}{each.path}" for each in job.mounts))
    if any("$" in word or "`" in word for word in words):
        yield "# shellcheck disable=SC2016  # words with $ and backticks, as they were given"


def lines(words: Iterable[str]) -> str:
    """A command over several lines: what begins with a hyphen begins one."""
    told = ""
    for word in words:
        told += word if not told else f" \\\n  {word}" if word.startswith(("-", "torchrun")) else f" {word}"
    return told
