"""The profiles of a run's steps, read beside it: which rank was late in each."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from shardwise.core.errors import ShardwiseError, TraceError

PROFILES = "profiles"
PREDICTED = "predicted"


class Profiles:
    """read() what ranks have written; lines() once they are read. keep: profiles that stay, the newest.
    predicted: a folder with the step as it was predicted, as predict --out writes it."""

    def __init__(self, folder: Path, keep: int, world_size: int, predicted: Path | None = None) -> None:
        self._predicted = predicted
        self._folder, self._keep, self._world_size = folder, keep, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="profiles")
        self._asked: list[Future[str]] = []

    def read(self, step: int) -> None:
        """In a thread: the run goes on."""
        self._asked.append(self._thread.submit(self._read, step))

    def lines(self, *, wait: bool = False) -> tuple[str, ...]:
        """Of the profiles that were read since this was last called. wait: for all that were asked for."""
        ready = [each for each in self._asked if wait or each.done()]
        self._asked = [each for each in self._asked if each not in ready]
        return tuple(each.result() for each in ready)

    def _read(self, step: int) -> str:
        folder = self._folder / f"step-{step}"
        try:
            line = " ".join(_words(folder, self._world_size))
            if self._predicted is not None:
                line += f". Beside the prediction: shardwise diff {self._predicted} {folder}"
        except ShardwiseError as error:  # whatever it was, the run goes on
            line = f"its profile can't be read: {error}"
        except OSError as error:
            line = f"its profile can't be read: {folder}: {error.strerror or error}."
        self._remove_old(step)
        return f"step {step}: {line}"

    def _remove_old(self, last: int) -> None:
        """last: what comes after it may still be being written."""
        known = [
            (int(number), each)
            for each in self._folder.glob("step-*")
            if (number := each.name.removeprefix("step-")).isdecimal()
            and int(number) <= last
            and each.is_dir()
        ]
        for _, each in sorted(known)[: -self._keep]:
            shutil.rmtree(each, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _words(folder: Path, world_size: int) -> tuple[str, ...]:
    from shardwise.profiles.collectives import share
    from shardwise.profiles.late import late_words
    from shardwise.profiles.ranks import read_ranks, trace_files
    from shardwise.profiles.run import profile_run

    files = trace_files(folder)
    if len(files) != world_size:
        raise TraceError(
            f"{folder}: {len(files)} of {world_size} ranks' files are there. All hosts must share the "
            "folder, and have room in it."
        )
    timelines, sharing = share(read_ranks(files))
    made_of, late = late_words(profile_run(folder.name, timelines, sharing)) or ("no time was recorded", "")
    return f"{made_of}.", late, f"More: shardwise diff {folder}"
