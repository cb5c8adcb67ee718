"""One step of every so many, recorded on all ranks by the profiler."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from shardwise.core.errors import RunError
from shardwise.measure.profile import StepRecorder, record_profile


class _Dropped(Exception):  # noqa: N818  # never seen: it keeps half a profile from being written
    pass


class Recorded:
    """`with recorded.step(number): ...` around each step. Of `every` steps the last is recorded into
    folder/step-NUMBER, and the one before it warms the profiler up. all ranks call it alike; every: 0 for
    never. To be used in a `with`, which drops what is half recorded."""

    def __init__(self, folder: Path, every: int, model: nn.Module) -> None:
        self._folder, self._every, self._model = folder, every, model
        self._open = ExitStack()
        self._recorder: StepRecorder | None = None
        self._last = 0
        self.problem: str | None = None

    def folder_of(self, number: int) -> Path:
        return self._folder / f"step-{number}"

    def is_beside(self, number: int) -> bool:
        """Whether a profile may have slowed a step: recorded, the one before it, and the one after it, which
        waits for the slowest rank to write."""
        return bool(self._last) and self._last - 1 <= number <= self._last + 1

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A profile that can't be written leaves its line in `problem`."""
        if self._every and (number + 1) % self._every == 0:
            self._recorder = self._open.enter_context(record_profile(self.folder_of(number + 1), self._model))
        if self._recorder is None:
            yield
            return
        self._last = number
        with self._recorder.step():
            yield
        if number % self._every == 0:
            self._recorder, self.problem = None, None
            try:
                self._open.close()
            except RunError as error:
                self.problem = str(error)

    def was_recorded(self, number: int) -> bool:
        return bool(self._every) and number % self._every == 0 and self.folder_of(number).is_dir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorder is not None:
            dropped = _Dropped()
            with suppress(_Dropped):
                self._open.__exit__(_Dropped, dropped, None)
            with suppress(OSError):  # another rank's to remove
                self.folder_of(self._last + 1).rmdir()
