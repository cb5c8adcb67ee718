"""Progress on stderr: a bar on a terminal, with what is found so far under it; elsewhere a few lines."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from shardwise.cli.output import speaks
from shardwise.report.common.streams import Console, write_error

_LINES = 20
# what is tried changes often: without a terminal it is said no more often than that
_EVERY_S = 5.0


class _Bar(Progress):
    """A bar, and under it a line of what is found so far."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, no_wrap=True, overflow="ellipsis")


class ProgressLine:
    """`total` units of work, unknown until the first event. every_s: without a terminal no more lines than
    one in so many seconds, and the last; by default so many as there is work."""

    def __init__(self, every_s: float | None = None) -> None:
        self._every_s = every_s
        self._bar: _Bar | None = None
        self._last = ""
        self._found = ""
        self._said_s = -math.inf
        self._speaks = speaks()
        if self._speaks and sys.stderr.isatty():
            self._bar = _Bar(
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
        now, _, found = text.partition("\n")
        if self._bar is not None:
            self._bar.below = found
            self._bar.update(self._task, description=now)
            if total:
                self._bar.update(self._task, completed=done, total=total)
        elif self._every_s is not None and total:
            self._print_at_times(", ".join(filter(None, (now, found))), done, total)
        elif found:
            self._print_found(now, found)
        elif total <= _LINES * _LINES and left_s is None:
            self._print(text)
        elif done % max(1, total // _LINES) == 0:
            left = f", {left_s:.0f} s left" if left_s is not None else ""
            self._print(f"{text} ({done} of {total}{left})")

    def above(self, text: str, say: Callable[[str], None]) -> None:
        """A line that stays: over the bar, or by `say` where there is none."""
        if self._bar is not None:
            self._bar.console.print(Text(text))
        else:
            say(text)

    def _print_at_times(self, text: str, done: int, total: int) -> None:
        assert self._every_s is not None
        if done < total and time.monotonic() - self._said_s < self._every_s:
            return
        self._said_s = time.monotonic()
        self._print(f"{done:,} of {total:,}: {text}")

    def _print_found(self, now: str, found: str) -> None:
        """What is found when it changes, and else now and then what is tried."""
        is_time = time.monotonic() - self._said_s >= _EVERY_S
        if found == self._found and not is_time:
            return
        self._said_s = time.monotonic()
        self._print(f"{now}; {found}" if found != self._found else now)
        self._found = found

    def _print(self, text: str) -> None:
        if self._speaks and text != self._last:
            write_error(f"shardwise: {text}")
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
