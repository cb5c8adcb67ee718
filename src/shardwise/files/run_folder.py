"""The run folder: settings first, events as they come, results at the end. A disk that is full or read-only
ends the run at once."""

import os
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from shardwise.core.errors import OptionError, RunError

_SETTINGS = "settings.json"


class RunFolder:
    """A new folder for one run. Raises OptionError where it can't be made or holds a run, RunError when
    writing fails later on.

    has_events: whether the run has an events.jsonl, to which append_event() writes.
    """

    def __init__(self, out: Path | None, command: str, started: datetime, *, has_events: bool = True) -> None:
        self.path = out if out is not None else _fresh(Path("runs") / f"{command}-{started:%Y%m%d-%H%M%S}")
        if out is not None:
            check_free(out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._events = (self.path / "events.jsonl").open("ab", buffering=0) if has_events else None
        except OSError as error:
            raise OptionError(
                f"--out {self.path}: {error.strerror}. Choose a folder that can be written."
            ) from None

    @classmethod
    def again(cls, out: Path) -> Self:
        """The folder of a run that goes on. Raises OptionError where there is none."""
        if not holds_run(out):
            raise OptionError(
                f"--out {out}: holds no run to go on with: it has no {_SETTINGS}. Name the folder of one, or "
                "leave --resume out."
            )
        folder = cls.__new__(cls)
        folder.path, folder._events = out, None
        return folder

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.path / name
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise self._lost(path, error) from None
        return path

    def append_event(self, event: bytes) -> None:
        """One line of events.jsonl, on disk at once."""
        assert self._events is not None
        try:
            self._events.write(event + b"\n")
        except OSError as error:
            raise self._lost(self.path / "events.jsonl", error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()

    def _lost(self, path: Path, error: OSError) -> RunError:
        stopped = "All ranks were stopped. " if self._events is not None else ""
        return RunError(
            f"can't write {path}: {error.strerror}. {stopped}Free space there, or choose another folder with "
            "--out."
        )


def check_free(out: Path) -> None:
    """Raises OptionError for a folder that can't be a new run's: asked before the work, and after it."""
    if holds_run(out):
        raise OptionError(f"--out {out}: holds a run already. Choose another folder, or remove it.")
    check_makeable(out)


def check_makeable(out: Path) -> None:
    """Raises OptionError for a folder that can't be made or written."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise OptionError(f"--out {out}: {there} is no folder. Choose a folder that can be written.")
    if not os.access(there, os.W_OK):
        raise OptionError(f"--out {out}: {there} can't be written. Choose a folder that can be written.")


def holds_run(out: Path) -> bool:
    """Whether a folder is that of a run."""
    return (out / _SETTINGS).exists()


def _fresh(path: Path) -> Path:
    """The path, or with -2, -3, ... where another run has just taken it."""
    candidate, count = path, 2
    while True:
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            candidate, count = path.with_name(f"{path.name}-{count}"), count + 1
        except OSError as error:
            raise OptionError(
                f"--out {candidate}: {error.strerror}. Choose a folder that can be written with --out."
            ) from None
        else:
            return candidate
