"""Tasks on a few processes, which end with the command: by a signal, an error, or when they are done. Public
parts of multiprocessing only."""

import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Generic, Self, TypeVar

from shardwise.core.errors import RunError
from shardwise.workers.garbage import collect_rarely

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def on_processes(
    function: Callable[[_Task], _Result],
    tasks: Iterable[_Task],
    workers: int,
    killed: str,
    preload: Collection[str] = (),
    set_up: Callable[[], None] | None = None,
) -> Iterator[_Result]:
    """Results as they come. Raises what `function` raises; RunError, with the words `killed`, where a process
    was killed. preload, set_up: see Processes."""
    waiting = list(tasks)
    with Processes(function, min(workers, len(waiting)), killed, preload, set_up) as processes:
        for _, result in processes.results(waiting):
            yield result


class Processes(Generic[_Task, _Result]):
    """Processes that stay for several rounds of tasks, and end with the `with` block. preload: modules
    that are imported once for all of them, before they are forked (by a process of its own, which has no
    threads). set_up: what each does first."""

    def __init__(
        self,
        function: Callable[[_Task], _Result],
        workers: int,
        killed: str,
        preload: Collection[str] = (),
        set_up: Callable[[], None] | None = None,
    ) -> None:
        self._killed = killed
        context = get_context("forkserver") if preload else get_context("spawn")
        context.set_forkserver_preload(["shardwise.workers.forked", *preload])
        pairs = [context.Pipe() for _ in range(workers)]
        self._theirs = [theirs for _, theirs in pairs]
        self._free = [ours for ours, _ in pairs]
        self._all = tuple(self._free)
        self._busy: dict[Connection, _Task] = {}
        self._processes = [
            context.Process(target=_serve, args=(function, set_up, theirs), daemon=True)
            for theirs in self._theirs
        ]

    def __enter__(self) -> Self:
        try:
            with _undisturbed():
                for process, theirs in zip(self._processes, self._theirs, strict=True):
                    process.start()
                    theirs.close()  # so that its end is seen
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.terminate()
        for process in self._processes:
            if process.pid is not None:
                process.join()
        for ours in self._all:
            ours.close()

    @property
    def under_way(self) -> list[_Task]:
        """Of a round that was broken off: the next one gives their results too."""
        return list(self._busy.values())

    def results(self, tasks: Iterable[_Task]) -> Iterator[tuple[_Task, _Result]]:
        """Each task with its result, as they come; those first that were given first."""
        waiting = list(tasks)[::-1]
        while waiting or self._busy:
            while waiting and self._free:
                self._send(self._free.pop(), waiting.pop())
            for ready in wait(list(self._busy)):
                assert isinstance(ready, Connection)
                try:
                    worked, result = ready.recv()
                except (EOFError, OSError):
                    raise RunError(self._killed) from None
                task = self._busy.pop(ready)
                self._free.append(ready)
                if not worked:
                    raise result
                if waiting:
                    self._send(self._free.pop(), waiting.pop())
                yield task, result

    def _send(self, to: Connection, task: _Task) -> None:
        try:
            to.send(task)
        except OSError:
            raise RunError(self._killed) from None
        self._busy[to] = task


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


def _serve(function: Callable[[_Task], _Result], set_up: Callable[[], None] | None, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to answer
    collect_rarely()
    if set_up is not None:
        set_up()
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
