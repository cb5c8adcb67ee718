"""A rank's micro-batches, made while the step before them runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

from shardwise.step.portion import MicroBatches, Portion
from shardwise.text.batches import Batch
from shardwise.text.samples import Samples


class Feed:
    """Batches of `batch` sequences over all ranks, from a position on. This rank reads its own part only.
    Its thread ends with the `with`."""

    def __init__(self, samples: Samples, portion: Portion, batch: int, position: int) -> None:
        self._samples, self._batch = samples, batch
        self._sequences = portion.part.sequences(batch)
        self._own = replace(portion, part=replace(portion.part, place=0, places=1))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._position = position
        self._next: Future[MicroBatches] = self._thread.submit(self._at, position)

    def take(self) -> MicroBatches:
        """The next batch's, waiting for it if it isn't there yet; the one after is begun."""
        micro_batches = self._next.result()
        self._position += self._batch
        self._next = self._thread.submit(self._at, self._position)
        return micro_batches

    @property
    def position(self) -> int:
        """Sequences that were taken, of all ranks, since the run's start."""
        return self._position

    def held_out(self, index: int) -> MicroBatches:
        """Of a batch of sequences held out, from number `index` on."""
        return self._cut(self._samples.held_out_at, index)

    def _at(self, position: int) -> MicroBatches:
        return self._cut(self._samples.at, position)

    def _cut(self, read: Callable[[int, int], Batch], first: int) -> MicroBatches:
        own = self._sequences
        batch = read(first + own.start, own.stop - own.start)
        return self._own.cut(batch.ids_BS, batch.labels_BS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
