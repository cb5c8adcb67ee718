"""Mail through a torch Store: in memory, so a full disk can't stop it; bytes in, bytes out, never pickle.
Knows nothing of processes.

A TCPStore refuses values of more than 8 MiB (TCPStoreLibUvBackend.cpp, "Invalid payload size"), so longer
ones travel in pieces.
"""

import struct
import threading
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PIECE_BYTES = 4 * 2**20

_QUEUE = "mail"
_PIECE_HEADER = struct.Struct("!I?")  # rank, whether this is the last piece


class Kind(Enum):
    """What a rank tells the one that watches it."""

    READY = "ready"
    NOTE = "note"
    EVENT = "event"
    RESULT = "result"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Mail:
    """One message of one rank; sent_s is the sender's time.time()."""

    rank: int
    kind: Kind
    sent_s: float
    body: bytes


class Outbox:
    """One rank's way to send. Mail arrives in the order in which it was sent, from any thread."""

    def __init__(self, store: "Store", rank: int) -> None:
        self._store = store
        self._rank = rank
        self._lock = threading.Lock()

    def send(self, kind: Kind, body: bytes) -> None:
        data = msgspec.msgpack.encode(Mail(rank=self._rank, kind=kind, sent_s=time.time(), body=body))
        with self._lock:
            for start in range(0, len(data), PIECE_BYTES):
                end = start + PIECE_BYTES
                self._store.queue_push(
                    _QUEUE, _PIECE_HEADER.pack(self._rank, end >= len(data)) + data[start:end]
                )

    def flush(self) -> None:
        """Returns when the store has it all: a push waits for no answer, a query on its connection does."""
        self._store.queue_len(_QUEUE)


class Inbox:
    """Every rank's mail; one reader."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._pieces: dict[int, bytearray] = {}

    def collect(self) -> list[Mail]:
        """The mail that is complete by now; doesn't wait."""
        arrived = []
        for _ in range(self._store.queue_len(_QUEUE)):
            piece = self._store.queue_pop(_QUEUE, block=False)
            rank, is_last = _PIECE_HEADER.unpack_from(piece)
            data = self._pieces.setdefault(rank, bytearray())
            data += piece[_PIECE_HEADER.size :]
            if is_last:
                arrived.append(msgspec.msgpack.decode(self._pieces.pop(rank), type=Mail))
        return arrived


def put(store: "Store", key: str, data: bytes) -> None:
    """Leaves data for every rank to take."""
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    for index, piece in enumerate(pieces):
        # the stub says str; the binding takes bytes
        store.set(f"{key}/{index}", piece)  # type: ignore[arg-type]
    store.set(f"{key}/count", str(len(pieces)))


def take(store: "Store", key: str) -> bytes:
    """The data that was put under key; waits for it as long as the store's timeout."""
    return b"".join(store.get(f"{key}/{index}") for index in range(int(store.get(f"{key}/count"))))
