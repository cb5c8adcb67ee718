"""Which storages there are while a step runs: who made each, and when it came and went."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from shardwise.core.program import Collective, Op, Phase
from shardwise.parallel.issuing import Sends
from shardwise.torch_private import storage_key
from shardwise.trace.place import Place


@dataclass(slots=True)
class Storage:
    """One storage that was seen: its size, who made it, and on which stream (0: the one that computes).
    is_shard, is_gathered: see MemoryChange."""

    n_bytes: int
    phase: Phase
    module: str
    maker: str
    stream: int = 0
    is_shard: bool = False
    is_gathered: bool = False


@dataclass(frozen=True, slots=True)
class Came:
    """The storage with this number exists from here on."""

    storage: int


@dataclass(frozen=True, slots=True)
class Went:
    storage: int


@dataclass(frozen=True, slots=True)
class Routed:
    """A collective whose splits the batch decides. sends: in bytes, where token ids alone don't tell: a
    router does, of which a trace knows nothing."""

    collective: Collective
    sends: Sends | None = None


Event = Op | Collective | Routed | Came | Went


class Log:
    """`events` in order, from the moment at which `is_on`; before that storages are seen, and nothing is
    written down."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_on = False

    def add(self, event: Event) -> None:
        if self.is_on:
            self.events.append(event)


class Storages:
    """`seen`: by number."""

    def __init__(self, log: Log, place: Place) -> None:
        self.seen: list[Storage] = []
        self._log = log
        self._place = place
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._streams: list[object] = [torch.cpu.current_stream()]

    def number_of(self, tensor: Tensor) -> int | None:
        """Of a plain tensor's storage, if it was seen."""
        known = self._live.get(storage_key(tensor.untyped_storage()))
        return known[0] if known else None

    def note(self, tensor: Tensor, maker: str) -> int:
        """The number of a tensor's storage, which is noted unless it is known."""
        known = self.number_of(tensor)
        storage = tensor.untyped_storage()
        return self._add(storage, storage.nbytes(), maker) if known is None else known

    def note_all(self, tensors: Sequence[Tensor], maker: str) -> None:
        for tensor in tensors:
            self.note(tensor, maker)

    def mark_shards(self, tensors: Sequence[Tensor]) -> None:
        """That these are as large as this rank's shards."""
        for storage in self._seen_of(tensors):
            storage.is_shard = True

    def mark_gathered(self, tensors: Sequence[Tensor]) -> None:
        """That FSDP gathered parameters into these."""
        for storage in self._seen_of(tensors):
            storage.is_gathered = True

    def _seen_of(self, tensors: Sequence[Tensor]) -> Iterator[Storage]:
        for number in map(self.number_of, tensors):
            if number is not None and number >= 0:
                yield self.seen[number]

    def _add(self, storage: torch.UntypedStorage, n_bytes: int, maker: str) -> int:
        key, number = storage_key(storage), self._came(n_bytes, maker)
        self._live[key] = (number, weakref.ref(storage, lambda _: self._gone(key, number)))
        return number

    def _came(self, n_bytes: int, maker: str) -> int:
        number = len(self.seen)
        module = self._place.module if self._log.is_on else ""
        self.seen.append(Storage(n_bytes, self._place.phase, module, maker, self._stream()))
        self._log.add(Came(number))
        return number

    @contextmanager
    def passing(self, sizes: Sequence[int], maker: str) -> Iterator[None]:
        """Storages of these bytes that nobody outside an op sees, while it runs."""
        numbers = [self._came(n_bytes, maker) for n_bytes in sizes]
        yield
        for number in reversed(numbers):
            self._log.add(Went(number))

    def _stream(self) -> int:
        """The number of the stream that is current. A trace's streams are the host's, which are names alone;
        who uses them (FSDP2) does so as on a device."""
        current = torch.cpu.current_stream()
        found = next((at for at, each in enumerate(self._streams) if each is current), None)
        if found is None:
            self._streams.append(current)
            return len(self._streams) - 1
        return found

    def _gone(self, key: int, number: int) -> None:
        if self._live.get(key, (None,))[0] == number:
            del self._live[key]
            self._log.add(Went(number))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows storages that are resized: so FSDP2 frees and makes them."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = original(storage, size)
            key = storage_key(storage)
            known = self._live.get(key)
            if known is not None and storage.nbytes() != before:
                self._gone(key, known[0])
                if size:
                    self._add(storage, size, "resize_")
                else:  # empty, but known: it isn't made anew when it is seen again
                    self._live[key] = (-1, weakref.ref(storage, lambda _: self._live.pop(key, None)))
            return result

        with patch.object(torch.UntypedStorage, "resize_", resize_):
            yield
