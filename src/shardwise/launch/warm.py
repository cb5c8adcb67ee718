"""Ranks that start at once: forked from a process that has imported PyTorch and the entry's module already.

A rank in an interpreter of its own takes seconds of a core, nearly all of it to import. Within warm_ranks()
one process does so once, and each rank of each run is a fork of it: with the parent's environment, folder
and import path, in a session of its own, with its own log, and gone with the parent, as the others are. Two
things differ. What libraries read while they are loaded they have from the first run's environment; the
number of threads alone is each run's own. And all ranks hash strings alike, so that a set's order, which may
differ on real ranks, does not.

On the CPU only: a rank on cuda is always an interpreter of its own.
"""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from shardwise.launch.assignment import START_S
from shardwise.launch.template import News, Order

_END_S = 5.0


class Template:
    """The process, and what it tells of the ranks that were forked from it."""

    def __init__(self, environment: dict[str, str], imports: tuple[str, ...] = ()) -> None:
        """Raises OSError where the system can't start a process."""
        self._imports = imports
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "shardwise.launch.template", str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        self._pending = b""
        self._last: dict[int, News] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, entry: str, environment: dict[str, str], log: Path) -> "Forked":
        """Raises OSError where no process can be forked."""
        order = Order(entry, environment, tuple(sys.path), os.getcwd(), str(log.absolute()), self._imports)
        self._socket.sendall(order.line())
        deadline_s = time.monotonic() + START_S
        while True:
            for news in self._hear(max(0.0, deadline_s - time.monotonic())):
                if news.what == "forked":
                    return Forked(self, news.pid)
            if not self.is_alive or time.monotonic() > deadline_s:
                raise OSError("the process that ranks are forked from doesn't answer")

    def news_of(self, pid: int, limit_s: float = 0.0) -> News:
        """The last of a rank, after waiting for more as long as limit_s."""
        if self._last[pid].what != "ended":
            self._hear(limit_s)
            if not self.is_alive and self._last[pid].what != "ended":  # the kernel killed the rank with it
                self._last[pid] = News(pid, "ended", -9)
        return self._last[pid]

    def _hear(self, limit_s: float) -> list[News]:
        """What came; waits for the first of it."""
        if not select.select([self._socket], [], [], limit_s)[0]:
            return []
        received = self._socket.recv(2**16)
        if not received:
            self._process.wait(_END_S)
            return []
        *lines, self._pending = (self._pending + received).split(b"\n")
        heard = [News.of_line(line) for line in lines]
        self._last.update((news.pid, news) for news in heard)
        return heard

    def close(self) -> None:
        """Ends it, and with it whatever rank is left."""
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Forked:
    """A rank that was forked from a template (a RankProcess)."""

    def __init__(self, template: Template, pid: int) -> None:
        self._template = template
        self._pid = pid

    @property
    def pid(self) -> int:
        return self._pid

    def poll(self) -> int | None:
        news = self._template.news_of(self._pid)
        return news.number if news.what == "ended" else None

    def wait(self, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while self.poll() is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            self._template.news_of(self._pid, left_s)
        return True

    def stopped_by(self) -> int | None:
        news = self._template.news_of(self._pid)
        return news.number if news.what == "stopped" else None


@dataclass(slots=True)
class _Kept:
    """template: once a run has asked for it."""

    imports: tuple[str, ...]
    template: Template | None = None

    def close(self) -> None:
        if self.template is not None:
            self.template.close()
            self.template = None


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def warm_ranks(*imports: str, warm: bool = True) -> Iterator[None]:
    """Ranks of runs within it are forked from a warm process, which ends with it. imports: modules that it
    imports besides, for ranks that would; what isn't installed is left to them. Not warm: each is an
    interpreter of its own again, within another one."""
    kept = _Kept(imports)
    before = _kept.set(kept if warm and hasattr(os, "fork") else None)
    try:
        yield
    finally:
        _kept.reset(before)
        kept.close()


def warm_template(device_type: str, environment: dict[str, str]) -> Template | None:
    """What ranks are forked from; None where they are to be interpreters of their own. Raises OSError where
    the system can't start a process."""
    kept = _kept.get()
    if kept is None or device_type != "cpu":
        return None
    if kept.template is not None and not kept.template.is_alive:
        kept.close()
    if kept.template is None:
        kept.template = Template(environment, kept.imports)
    return kept.template
