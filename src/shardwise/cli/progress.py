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

from shardwise.cli.output import speaks

_LINES = 20


class ProgressLine:
    """`total` units of work, unknown until the first event."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._last = ""
        self._speaks = speaks()
        if self._speaks and sys.stderr.isatty():
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

    def __call__(self, text: str, done: int = 0, total: int = 0, left_s: float | None = None) -> None:
        """See verbs/progress.py. Plain lines of many units are few: every so manieth, with their number."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            if total:
                self._bar.update(self._task, completed=done, total=total)
        elif total <= _LINES * _LINES and left_s is None:
            self._print(text)
        elif done % max(1, total // _LINES) == 0:
            left = f", {left_s:.0f} s left" if left_s is not None else ""
            self._print(f"{text} ({done} of {total}{left})")

    def _print(self, text: str) -> None:
        if self._speaks and text != self._last:
            print(f"shardwise: {text}", file=sys.stderr, flush=True)
            self._last = text

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
