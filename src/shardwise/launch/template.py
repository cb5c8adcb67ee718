"""The process that warm ranks are forked from: `python -m shardwise.launch.template FD`, started by warm.py,
which speaks to it over the socket FD. It imports what ranks import, once, and runs none of it.

A message is a line of JSON. It is told of each rank to fork (`Order`), and tells its process id, when it is
stopped and goes on, and how it ended (`News`). It ends when the other side does, and takes its ranks with it.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Self

from shardwise.launch import leave


@dataclass(frozen=True, slots=True)
class Order:
    """A rank to fork, and what it would have had as an interpreter of its own. imports: what it has imported
    besides when it begins."""

    entry: str
    environment: Mapping[str, str]
    path: tuple[str, ...]
    folder: str
    log: str
    imports: tuple[str, ...] = ()

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Self:
        told = json.loads(line)
        return cls(**{**told, "path": tuple(told["path"]), "imports": tuple(told["imports"])})


@dataclass(frozen=True, slots=True)
class News:
    """What became of a rank: "forked"; "stopped" by a signal; "going"; "ended" with an exit code, a signal's
    negative."""

    pid: int
    what: str
    number: int = 0

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Self:
        return cls(**json.loads(line))


def main(watcher: socket.socket) -> None:
    """Until the other side closes the socket."""
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes.fileno())
    alive: set[int] = set()
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(watcher, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                woken.recv(4096)
            for news in _changes(alive):
                watcher.sendall(news.line())
            if watcher not in ready:
                continue
            received = watcher.recv(2**16)
            if not received:
                break
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                pid = _fork(Order.of_line(line), (watcher, woken, wakes))
                alive.add(pid)
                watcher.sendall(News(pid, "forked").line())
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _changes(alive: set[int]) -> list[News]:
    found = []
    for pid in tuple(alive):
        while True:
            changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not changed:
                break
            if os.WIFSTOPPED(status):
                found.append(News(pid, "stopped", os.WSTOPSIG(status)))
            elif os.WIFCONTINUED(status):
                found.append(News(pid, "going"))
            else:
                alive.discard(pid)
                found.append(News(pid, "ended", os.waitstatus_to_exitcode(status)))
                break
    return found


def _fork(order: Order, sockets: tuple[socket.socket, ...]) -> int:
    _import(order)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in sockets:
            each.close()
        code = _be(order)
    finally:
        leave.at_once(code)  # an interpreter's own end would also touch, and so copy, all that is shared


def _import(order: Order) -> None:
    """What fails here fails again in the rank, which tells it."""
    sys.path[:] = order.path
    for name in ("torch.distributed", order.entry.partition(":")[0], *order.imports):
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a rank's collections needn't look at it


def _be(order: Order) -> int:
    """A rank, from here on."""
    os.setsid()
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    _part_from_the_others()
    _take_threads()

    from shardwise.launch import rank

    return rank.main(order.entry)


def _part_from_the_others() -> None:
    """Generators that a process seeds by chance when they are imported would be alike on all ranks. (random's
    own does that by itself.)"""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _take_threads() -> None:
    """As many as its own environment says: PyTorch has read that of the first run."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
