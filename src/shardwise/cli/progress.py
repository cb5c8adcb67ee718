"""Progress on stderr: a bar on a terminal, a few plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressLine:
    """`total` units of work, unknown until the first event."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._last = ""
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("starting ranks", total=None)

    @property
    def is_plain(self) -> bool:
        """Whether lines are printed: a bar counts and guesses the time left by itself."""
        return self._bar is None

    def say(self, text: str) -> None:
        """A new phase."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif text != self._last:
            print(f"shardwise: {text}", file=sys.stderr, flush=True)
            self._last = text

    def advance(self, done: int, total: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=text)
        else:
            self.say(text)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
