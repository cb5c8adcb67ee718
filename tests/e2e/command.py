"""The command as a user starts it: in this process, which is quick, or in one of its own; and its ranks,
found by process id."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil

from shardwise.cli.main import _run

SHARDWISE = str(Path(sys.executable).with_name("shardwise"))
# Small, for its layers are checked in float64 on every rank; its name is longer than messages show.
MODEL = "llama3-debug?n_layers=2,hidden=96,n_heads=12,n_kv_heads=4,ffn_hidden=256,vocab_size=512"
SMALL = ("--model", MODEL, "--seq", "32", "--batch", "2", "--rounds", "2", "--warmup", "0")
_WARM = """
import sys
from shardwise.cli.main import run
from shardwise.launch import warm_ranks
with warm_ranks():
    run(sys.argv[1:])
"""
# Nothing here is timed: how long a test waits for what must come, on a machine that may be busy.
PATIENCE_S = 200.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def shardwise(*args: str, cwd: Path | None = None) -> Ended:
    """Runs the command to its end in this process: all but the installed script itself, and without importing
    PyTorch anew."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with _as_a_process(cwd), redirect_stdout(stdout), redirect_stderr(stderr):
        code = _run(list(args))
    return Ended(code, *(_written(stream) for stream in (stdout, stderr)))


@contextmanager
def _as_a_process(cwd: Path | None) -> Iterator[None]:
    """A user's modules are looked for beside where the command starts, and forgotten when it has ended."""
    path, modules = sys.path.copy(), sys.modules.copy()
    with chdir(cwd) if cwd else nullcontext():
        try:
            yield
        finally:
            sys.path[:] = path
            for name in sys.modules.keys() - modules.keys():
                if cwd and (getattr(sys.modules[name], "__file__", None) or "").startswith(str(cwd)):
                    del sys.modules[name]


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined,no-any-return]


def shardwise_process(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the installed script to its end."""
    return subprocess.run([SHARDWISE, *args], capture_output=True, text=True, cwd=cwd, check=False)


def start(*args: str, cwd: Path, warm: bool = False) -> subprocess.Popen[str]:
    """Starts the command, as from a terminal: with the signals that a test run in the background may
    ignore. warm: with ranks that are forked from a process that has imported PyTorch, for those that start
    many; an interpreter of its own takes each three seconds of a core to begin."""
    return subprocess.Popen(
        [sys.executable, "-c", _WARM, *args] if warm else [SHARDWISE, *args],
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


def children_of(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a started command has now, theirs too."""
    try:
        return list(psutil.Process(parent.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def ranks_of(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a started command has now, by rank."""
    children = children_of(parent)
    warm = {child.pid for child in children if _is_warm(child)}
    ranks = [
        child
        for child in children
        if "shardwise.launch.rank" in _command_line(child)
        or (child.pid in warm and _parent_of(child) in warm)
    ]
    return sorted(ranks, key=lambda child: (child.create_time(), child.pid))


def forked_ranks() -> list[psutil.Process]:
    """The ranks that a command in this process has left."""
    warm = [each for each in psutil.Process().children() if _is_warm(each)]
    return [rank for each in warm for rank in each.children()]


def _parent_of(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.Error:
        return None


def _is_warm(process: psutil.Process) -> bool:
    return "shardwise.launch.template" in _command_line(process)


def _command_line(process: psutil.Process) -> Sequence[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return ()


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns as soon as it holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to hold"
        time.sleep(0.05)


def wait_for_rounds(out: Path, parent: subprocess.Popen[str]) -> None:
    """Until a run has timed its first step, so that what follows happens in mid-run."""
    events = out / "events.jsonl"
    wait_until(lambda: parent.poll() is not None or (events.exists() and '"round 1 of' in events.read_text()))
    assert parent.poll() is None, f"the run never reached its rounds: {parent.communicate()}"


def wait_for_line(parent: subprocess.Popen[str], text: str) -> None:
    """Until a started command says this on stderr."""
    assert parent.stderr
    said = []
    for line in parent.stderr:
        if text in line:
            return
        said.append(line)
    raise AssertionError(f"it never said {text!r}: {said}")


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether all of them end."""
    return not psutil.wait_procs(processes, timeout=PATIENCE_S)[1]
