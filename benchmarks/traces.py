"""How fast a profiler trace of a million events becomes a Timeline, beside Holistic Trace Analysis' loading
of it.

    python -m benchmarks.traces   writes results/DATE-trace-read.json; makes .venv-hta for the peer
    python -m benchmarks.traces --dry         prints, writes nothing

Every side runs as a process of its own, once per round, in rotating order; CPU seconds are of the process and
all that it started.
"""

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import command_line, describe_machine, load_average, now, rank_variables
from benchmarks.trace_file import write_trace
from benchmarks.trace_results import Run, Side, blocks

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".venv-hta"
# HTA 0.5.0 fails on pandas 3
PEER_PACKAGES = ("HolisticTraceAnalysis==0.5.0", "pandas==2.3.3")
EVENTS = 1_000_000
RANKS, RANK_EVENTS = 8, 200_000
TIMEOUT_S = 600

_OURS = (
    "import sys; from pathlib import Path; from shardwise.profiles.read import read_timeline; "
    "read_timeline(Path(sys.argv[1]))"
)
_THEIRS = (
    "import sys, os; from hta.trace_analysis import TraceAnalysis; "
    "TraceAnalysis(trace_files={0: sys.argv[1]}, trace_dir=os.path.dirname(sys.argv[1]))"
)
_ALL_RANKS = (
    "import resource, sys\n"
    "from pathlib import Path\n"
    "from shardwise.profiles.ranks import read_ranks, trace_files\n"
    "if __name__ == '__main__':\n"
    "    read_ranks(trace_files(Path(sys.argv[1])), workers=int(sys.argv[2]))\n"
    "    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, "
    "resource.RUSAGE_CHILDREN)))\n"
)


@dataclass(slots=True)
class _Timed:
    name: str
    command: list[str]
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


def time_once(side: _Timed) -> None:
    """Runs it to its end and keeps what it took."""
    start = time.perf_counter()
    process = subprocess.Popen(side.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.perf_counter() > start + TIMEOUT_S:
            process.kill()
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    side.wall_s.append(time.perf_counter() - start)
    side.cpu_s.append(usage.ru_utime + usage.ru_stime)
    side.bytes.append(usage.ru_maxrss * 1024)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(
            f"{side.name}: exit code {process.returncode}: {process.stderr.read().decode()[-500:]}"
        )


def peer_python() -> Path:
    """The Python that has the peer; set up once."""
    python = PEER / "bin" / "python"
    if not python.exists():
        print(f"setting up {PEER}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        try:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(PEER)
            raise SystemExit(
                f"{', '.join(PEER_PACKAGES)} can't be installed: is a package registry within reach?"
            ) from None
    return python


def read_all(folder: Path, workers: int) -> tuple[int, int, float, int]:
    """(files, processes at once, seconds, largest process's bytes) of reading a folder of ranks."""
    script = folder.parent / "all_ranks.py"
    script.write_text(_ALL_RANKS)
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, str(script), str(folder), str(workers)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return RANKS, workers, time.perf_counter() - start, int(ended.stdout.split()[-1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traces", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    peer = peer_python()
    started, before = now(), load_average()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, packed, many = folder / "trace.json", folder / "trace.json.gz", folder / "ranks"
        write_trace(plain, EVENTS)
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        many.mkdir()
        for rank in range(RANKS):
            write_trace(many / f"rank{rank}.json", RANK_EVENTS, rank=rank)
        sides = [
            _Timed("shardwise", [sys.executable, "-c", _OURS, str(plain)]),
            _Timed("shardwise, gzip", [sys.executable, "-c", _OURS, str(packed)]),
            _Timed("HTA's load alone", [str(peer), "-c", _THEIRS, str(plain)]),
        ]
        for number in range(arguments.rounds):
            turn = number % len(sides)
            for side in sides[turn:] + sides[:turn]:
                time_once(side)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        ranks = tuple(read_all(many, workers) for workers in (1, 2))
        file_bytes = plain.stat().st_size
    run = Run(
        describe_machine(
            command_line("benchmarks.traces"), 1, os.cpu_count() or 1, rank_variables(), started
        ),
        arguments.rounds,
        (before, load_average()),
        EVENTS,
        file_bytes,
        " on ".join(PEER_PACKAGES).replace("==", " "),
        tuple(Side(side.name, tuple(side.cpu_s), tuple(side.wall_s), tuple(side.bytes)) for side in sides),
        ranks,
    )
    print(next(iter(blocks(run).values())))
    if not arguments.dry:
        print(run.write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
