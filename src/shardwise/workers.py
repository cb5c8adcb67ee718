"""Tasks on a few processes, which end with the command: by a signal, an error, or when they are done. Public
parts of multiprocessing only."""

import gc
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from shardwise.core.errors import RunError

_FEW_COLLECTIONS = 200_000  # as in cli/main.py

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def on_processes(
    function: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int, killed: str
) -> Iterator[_Result]:
    """Results as they come. Raises what `function` raises; RunError, with the words `killed`, where a process
    was killed."""
    waiting = list(tasks)[::-1]
    context = get_context("spawn")
    pairs = [context.Pipe() for _ in range(min(workers, len(waiting)))]
    processes = [context.Process(target=_serve, args=(function, theirs), daemon=True) for _, theirs in pairs]
    busy: set[Connection] = set()
    try:
        with _undisturbed():
            for process, (ours, theirs) in zip(processes, pairs, strict=True):
                process.start()
                theirs.close()  # so that its end is seen
                ours.send(waiting.pop())
                busy.add(ours)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                try:
                    worked, result = ready.recv()
                except (EOFError, OSError):
                    raise RunError(killed) from None
                if not worked:
                    raise result
                if waiting:
                    ready.send(waiting.pop())
                else:
                    busy.remove(ready)
                yield result
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
        for ours, _ in pairs:
            ours.close()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C is answered when what is inside has been done. A process whose start is broken off, or which is
    itself told to stop before it can answer, would say so in a traceback."""
    resource_tracker.ensure_running()  # it unblocks the signal when it starts
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if is_main else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # new processes have it so
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if before is not None:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _serve(function: Callable[[_Task], _Result], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to answer
    gc.set_threshold(_FEW_COLLECTIONS)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[bool, object] = (True, function(task))
        except Exception as error:
            answer = (False, error)
        pipe.send(answer)
