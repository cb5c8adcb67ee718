"""The installed command as a process, as a user starts it; and its ranks, found by process id."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

SHARDWISE = str(Path(sys.executable).with_name("shardwise"))
SMALL = ("--seq", "32", "--batch", "2", "--rounds", "2", "--warmup", "0")
GRACE_S = 10.0


def shardwise(
    *args: str, cwd: Path | None = None, timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        [SHARDWISE, *args], capture_output=True, text=True, timeout=timeout_s, cwd=cwd, check=False
    )


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts the command, as from a terminal: with the signals that a test run in the background may ignore."""
    return subprocess.Popen(
        [SHARDWISE, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        preexec_fn=hear_signals,
    )


def hear_signals() -> None:
    """A shell's background jobs ignore Ctrl-C, and what they start does too."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def ranks_of(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a started command has now, by rank."""
    children = psutil.Process(parent.pid).children(recursive=True)
    found = [child for child in children if "shardwise.launch.rank" in " ".join(_command_line(child))]
    return sorted(found, key=lambda child: child.create_time())


def _command_line(process: psutil.Process) -> Sequence[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return ()


def wait_for_rounds(out: Path, parent: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    """Until a run has timed its first step, so that what follows happens in mid-run."""
    deadline_s = time.monotonic() + timeout_s
    events = out / "events.jsonl"
    while time.monotonic() < deadline_s and parent.poll() is None:
        if events.exists() and '"round 1 of' in events.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(
        f"the run never reached its rounds: {parent.communicate() if parent.poll() is not None else 'too slow'}"
    )


def gone(processes: Sequence[psutil.Process], within_s: float = GRACE_S) -> bool:
    """Whether all of them ended within the time."""
    return not psutil.wait_procs(processes, timeout=within_s)[1]
