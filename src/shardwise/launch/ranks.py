"""Starts ranks on this machine, watches them, and leaves none behind. Knows nothing of what they do.

The ranks are sessions of their own, so a Ctrl-C reaches this process alone. Its handlers only take a signal
down and the watching loop acts on it, so no rank is started without being known. PyTorch's elastic
start_processes does the same work, but it raises from its handlers, loses the ranks that it had begun, and
waits 30 s for a stopped rank; hence plain subprocess here.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import assert_never

import msgspec

from shardwise.core.errors import MeshError, RunError, ShardwiseError
from shardwise.launch import store, torchrun
from shardwise.launch.assignment import START_S, Assignment
from shardwise.launch.cause import BadEnd, Failure, Silence, error_for, first_cause, stall_error
from shardwise.launch.context import backend_of
from shardwise.launch.mail import Inbox, Kind, Mail, put
from shardwise.launch.process import RankProcess, Started, send_signal
from shardwise.launch.warm import warm_template

_POLL_S = 0.1
# How long after a failure a more telling one may still come in: a lost connection is reported before the
# death that caused it is seen.
_SETTLE_S = 1.0
_TERMINATE_S = 3.0
_KILL_S = 3.0
# Between a rank's last result and its end lies only the teardown of the process group.
_EXIT_S = 5.0


class Interrupted(RunError):  # noqa: N818  # says what happened, as KeyboardInterrupt does
    """This process was asked to end by SIGTERM or SIGHUP; its ranks were stopped first."""


def run_ranks(
    entry: str,
    payload: bytes,
    *,
    world_size: int,
    device_type: str,
    timeout_s: float,
    on_event: Callable[[bytes], None] | None = None,
    threads_per_rank: int = 1,
    log_dir: Path | None = None,
    can_stop: bool = False,
) -> list[bytes]:
    """What entry ("package.module:function", called with a RankContext and payload) returned on each rank, in
    order.

    Starts the ranks on this machine. Under torchrun every rank calls this: it runs entry in this process, and
    only rank 0 gets the results, others []. on_event gets each reported event, in order; what it raises stops
    the ranks and is raised here. When no rank reports or notes anything for timeout_s, the run is over. Each
    rank writes into log_dir/rank-N.log; without a log_dir, logs are kept only where an error names one.

    Raises MeshError for more ranks than GPUs or than torchrun started; the ShardwiseError that a rank raised;
    RunError for a rank that died, failed or stalled; Interrupted for SIGTERM and SIGHUP, KeyboardInterrupt
    for Ctrl-C. No rank outlives the call.
    """
    backend_of(device_type)
    handle = on_event or _ignore
    if torchrun.joined():
        return torchrun.run(
            entry,
            payload,
            world_size=world_size,
            device_type=device_type,
            timeout_s=timeout_s,
            on_event=handle,
            threads_per_rank=threads_per_rank,
        )
    _check_devices(device_type, world_size)
    with _signals_taken_down() as signals, _logs(log_dir, world_size) as logs:
        hosted, port = store.host()
        put(hosted, "payload", payload)
        ranks = _Ranks(Inbox(hosted), logs, timeout_s)
        patience = 1 if can_stop else 0
        try:
            for rank in range(world_size):
                _raise_for(signals)
                assignment = Assignment(os.getpid(), port, rank, world_size, device_type, timeout_s)
                ranks.start(entry, assignment, threads_per_rank)
            while len(ranks.results) < world_size:
                ranks.look(handle)
                _raise_for(signals[patience:])
                if signals and not ranks.are_asked_to_end:
                    ranks.ask_to_end()
                try:
                    ranks.raise_for_failure()
                except RunError:
                    _raise_for(signals)  # a rank that couldn't stop in its own way yet
                    ranks.stop()
                    ranks.look(handle)  # others went on for a moment, and told what they did
                    raise
                time.sleep(_POLL_S)
            ranks.await_exit(_EXIT_S)
        finally:
            ranks.stop()
        _raise_for(signals[patience:])
        return [ranks.results[rank] for rank in range(world_size)]


def _ignore(event: bytes) -> None:
    pass


class _Ranks:
    """The ranks of one run: their processes and what is known of each."""

    def __init__(self, inbox: Inbox, logs: list[Path], timeout_s: float) -> None:
        self.results: dict[int, bytes] = {}
        self._inbox = inbox
        self._logs = logs
        self._timeout_s = timeout_s
        self._processes: list[RankProcess] = []
        self._ready: set[int] = set()
        self._notes: dict[int, Mail] = {}
        self._failures: dict[int, BadEnd] = {}
        self._exits: dict[int, BadEnd] = {}
        self._failed_s: float | None = None
        self._heard_s = time.monotonic()
        self.are_asked_to_end = False

    def start(self, entry: str, assignment: Assignment, threads_per_rank: int) -> None:
        try:
            self._processes.append(_process(entry, assignment, threads_per_rank, self._logs[assignment.rank]))
        except OSError as error:
            raise RunError(
                f"rank {assignment.rank} can't be started: {error}. "
                "Free memory or processes, or use fewer ranks."
            ) from error
        self._heard_s = time.monotonic()

    def look(self, on_event: Callable[[bytes], None]) -> None:
        """Takes in what is new. Exits come before mail: a rank that has exited has sent all it had."""
        for rank, process in enumerate(self._processes):
            exit_code = process.poll()
            if exit_code is not None and rank not in self._exits:
                self._exits[rank] = BadEnd(rank, time.time(), failure=None, exit_code=exit_code)
        for mail in self._inbox.collect():
            self._take(mail, on_event)
            self._heard_s = time.monotonic()

    def _take(self, mail: Mail, on_event: Callable[[bytes], None]) -> None:
        match mail.kind:
            case Kind.READY:
                self._ready.add(mail.rank)
            case Kind.NOTE:
                self._notes[mail.rank] = mail
            case Kind.EVENT:
                on_event(mail.body)
            case Kind.RESULT:
                self.results[mail.rank] = mail.body
            case Kind.FAILURE:
                failure = msgspec.json.decode(mail.body, type=Failure)
                self._failures[mail.rank] = BadEnd(mail.rank, mail.sent_s, failure=failure, exit_code=None)
            case _:
                assert_never(mail.kind)

    def raise_for_failure(self) -> None:
        """Raises once it is clear why the run failed, or that nothing happens any more. How a rank ends after
        its result doesn't matter."""
        now_s = time.monotonic()
        ends = [end for rank, end in ({**self._exits, **self._failures}).items() if rank not in self.results]
        if ends:
            self._failed_s = self._failed_s or now_s
            cause = first_cause(ends)
            if cause.is_killed or now_s - self._failed_s >= _SETTLE_S:
                raise self._error(cause)
            return
        is_ready = len(self._ready) == len(self._processes)
        limit_s = self._timeout_s if is_ready else max(self._timeout_s, START_S)
        if now_s - self._heard_s >= limit_s:
            silences = {rank: self._silence(rank) for rank in range(len(self._processes))}
            raise stall_error(silences, silent_s=limit_s)

    def _error(self, cause: BadEnd) -> ShardwiseError:
        latest = max(self._notes.values(), key=lambda mail: mail.sent_s, default=None)
        mail = self._notes.get(cause.rank, latest)
        log = self._logs[cause.rank]
        return error_for(
            cause,
            world_size=len(self._processes),
            note=mail.body.decode() if mail else None,
            log=str(log) if log.is_file() and log.stat().st_size else None,
        )

    def _silence(self, rank: int) -> Silence:
        note = self._notes.get(rank)
        return Silence(
            is_ready=rank in self._ready,
            is_done=rank in self.results,
            stopped_by=self._processes[rank].stopped_by(),
            note=note.body.decode() if note else None,
        )

    def await_exit(self, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        for process in self._processes:
            if not process.wait(max(0.0, deadline_s - time.monotonic())):
                return

    def ask_to_end(self) -> None:
        """Passes on that they are to end in their own time."""
        self.are_asked_to_end = True
        for process in self._processes:
            send_signal(process, signal.SIGTERM)

    def stop(self) -> None:
        """Ends what still runs, by force where asking doesn't help."""
        for number, limit_s in ((signal.SIGTERM, _TERMINATE_S), (signal.SIGKILL, _KILL_S)):
            for process in self._processes:
                send_signal(process, number)
            self.await_exit(limit_s)


def _process(entry: str, assignment: Assignment, threads_per_rank: int, log: Path) -> RankProcess:
    environment = _environment(assignment.device_type, threads_per_rank)
    template = warm_template(assignment.device_type, environment)
    if template is None:
        with log.open("wb") as output:
            return Started(entry, environment | assignment.environment(), output)
    assignment = replace(assignment, parent_pid=template.pid)
    return template.fork(entry, environment | assignment.environment(), log)


def _environment(device_type: str, threads_per_rank: int) -> dict[str, str]:
    """This process's environment and import path; but for threads the user's values win."""
    defaults = {"TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        # Without huge pages the time of a fresh big tensor is that of its page faults; the same for every
        # plan.
        defaults["THP_MEM_ALLOC_ENABLE"] = "1"
    if device_type == "cpu":
        # Otherwise gloo looks up the host's own name, which may be slow, wrong or unknown.
        defaults |= [
            ("GLOO_SOCKET_IFNAME", name) for _, name in socket.if_nameindex() if name in ("lo", "lo0")
        ]
    threads = {"OMP_NUM_THREADS": str(threads_per_rank), "MKL_NUM_THREADS": str(threads_per_rank)}
    path = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    return {**defaults, **os.environ, **threads, **path}


def _check_devices(device_type: str, world_size: int) -> None:
    if device_type != "cuda":
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus < world_size:
        less = f"a mesh of at most {gpus} ranks, " if gpus else ""
        raise MeshError(
            f"mesh: {world_size} ranks on cuda need {world_size} GPUs; this machine has {gpus}. "
            f"Use {less}the CPU, or more machines through torchrun."
        )


@contextmanager
def _logs(log_dir: Path | None, world_size: int) -> Iterator[list[Path]]:
    """A log file for each rank. A folder of ours is removed, unless an error names a log in it."""
    try:
        folder = log_dir or Path(tempfile.mkdtemp(prefix="shardwise-logs-"))
        folder.mkdir(parents=True, exist_ok=True)
        logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        for log in logs:
            log.touch()
    except OSError as error:
        raise RunError(
            f"the ranks' logs can't be written: {error}. Choose another folder, or make room."
        ) from error
    named = False
    try:
        yield logs
    except RunError as error:
        named = str(folder) in str(error)
        raise
    finally:
        if log_dir is None and not named:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _signals_taken_down() -> Iterator[list[signal.Signals]]:
    """The signals that ask this process to end, as they arrive. One that is ignored stays so (nohup); off the
    main thread none is taken."""
    arrived: list[signal.Signals] = []

    def take_down(number: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, take_down)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_for(signals: list[signal.Signals]) -> None:
    if not signals:
        return
    if signals[0] is signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(f"stopped by {signals[0].name}; all ranks were ended.")
