"""Ends this process where it hangs: of torchrun's ranks nobody else sees that nothing moves.

A collective of the default process group ends by the group's timeout, but groups of a mesh's axes wait 10
minutes (NCCL) or 30 (gloo), whatever that one's is, and what isn't a collective waits as long as it likes. A
rank that waits in C++ can't be interrupted either, so the process ends, and torchrun starts it again.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from shardwise.core.errors import StalledError
from shardwise.launch.cause import hung_error

_LOOK_S = 0.2


class Patience:
    """To be used in a `with`. Once nothing was told for timeout_s, the process says so on stderr and ends
    with StalledError's exit code; nothing of it is cleaned up."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank, self._timeout_s = rank, timeout_s
        self._heard_s, self._note = time.monotonic(), ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)

    @property
    def note(self) -> str | None:
        """What the rank is at, as it said last."""
        return self._note or None

    def heard(self, note: str | None = None) -> None:
        """The rank has said something; a note is what it is at."""
        self._heard_s = time.monotonic()
        self._note = note or self._note

    def _watch(self) -> None:
        while not self._over.wait(min(_LOOK_S, self._timeout_s)):
            if time.monotonic() - self._heard_s < self._timeout_s:
                continue
            error = hung_error(self._rank, note=self.note, silent_s=self._timeout_s)
            sys.stderr.write(f"shardwise: {error}\n")
            sys.stderr.flush()
            os._exit(StalledError.exit_code)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
