"""One rank as the process that watches it sees it: an interpreter of its own, or forked from a warm one
(warm.py)."""

import os
import subprocess
import sys
from contextlib import suppress
from typing import IO, Protocol


class RankProcess(Protocol):
    """A rank's process, in a session of its own. Exit codes are Popen's: a signal is negative."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def wait(self, limit_s: float) -> bool:
        """Whether it has ended, within limit_s."""

    def stopped_by(self) -> int | None:
        """The signal that stopped (not ended) it; None if it runs, or where the system can't say."""


def send_signal(process: RankProcess, number: int) -> None:
    """To the rank and all that it started, unless it has ended."""
    if process.poll() is None:
        # macOS refuses for a group that has just ended.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


class Started:
    """A rank that is a child of this process, in an interpreter of its own."""

    def __init__(self, entry: str, environment: dict[str, str], log: IO[bytes]) -> None:
        """Raises OSError where the system can't start a process."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "shardwise.launch.rank", entry],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, limit_s: float) -> bool:
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stopped_by(self) -> int | None:
        if not hasattr(os, "waitid"):
            return None
        # leaves the child's status for Popen
        status = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        return status.si_status if status else None
