"""How long `shardwise explain` takes, start to finish, and what memory it needs.

    python -m benchmarks.explain              writes benchmarks/results/DATE-explain-speed.json
    python -m benchmarks.explain --dry        prints, writes nothing

Every command runs as a process of its own, once per round, in rotating order; the clock runs from its start
to its end.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.explain_results import WHAT, Run, Timed
from benchmarks.results import command_line, describe_machine, load_average, now, rank_variables

GIB = 2**30
TIMEOUT_S = 300


@dataclass(slots=True)
class Side:
    name: str
    arguments: str
    max_s: float | None = None
    max_bytes: int | None = None
    same_as: str | None = None
    max_ratio: float | None = None
    wall_s: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def sides() -> list[Side]:
    """What is timed; the bars are the project's."""
    bytes_8b = int(0.6 * GIB)
    step = "--model llama3-8b --mesh tp=8 --batch 1 --seq 8192"
    many = "--model llama3-8b --mesh dp=512,tp=8 --batch 512 --seq 8192"
    return [
        Side("rowwise, 8 B", f"explain rowwise {step}", 8, bytes_8b),
        Side("rowwise@dtensor, 8 B", f"explain rowwise@dtensor {step}", 8, bytes_8b),
        Side(
            "rowwise, 405 B",
            "explain rowwise --model llama3.1-405b --mesh dp=512,tp=8 --batch 512 --seq 8192",
            12,
        ),
        Side(
            "rowwise@dtensor, 405 B",
            "explain rowwise@dtensor --model llama3.1-405b --mesh dp=512,tp=8 --batch 512 --seq 8192",
            12,
        ),
        Side("rowwise, 8 B, 4096 ranks", f"explain rowwise {many}", same_as="rowwise, 8 B"),
        Side(
            "rowwise@dtensor, 8 B, 4096 ranks",
            f"explain rowwise@dtensor {many}",
            same_as="rowwise@dtensor, 8 B",
        ),
    ]


def time_once(side: Side) -> None:
    """Runs the command to its end and keeps its seconds, those of a core, and the largest resident set of its
    process."""
    command = [str(Path(sys.executable).parent / "shardwise"), *side.arguments.split()]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = start + TIMEOUT_S
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.perf_counter() > deadline:
            process.kill()
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    side.wall_s.append(time.perf_counter() - start)
    side.bytes.append(usage.ru_maxrss * 1024)
    side.cpu_s.append(usage.ru_utime + usage.ru_stime)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(
            f"{' '.join(command)}: exit code {process.returncode}: {process.stderr.read().decode()[-500:]}"
        )


def main() -> int:
    return measure("benchmarks.explain", (__doc__ or "").partition("\n\n")[0], sides(), WHAT, rounds=7)


def measure(module: str, about: str, found: list[Side], what: str, *, rounds: int) -> int:
    """A benchmark of whole commands: its arguments, its rounds, its file."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    started, before = now(), load_average()
    for number in range(arguments.rounds):
        turn = number % len(found)
        for side in found[turn:] + found[:turn]:
            time_once(side)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    run = Run(
        describe_machine(command_line(module), 1, os.cpu_count() or 1, rank_variables(), started),
        arguments.rounds,
        (before, load_average()),
        tuple(
            Timed(
                side.name,
                f"shardwise {side.arguments}",
                tuple(side.wall_s),
                tuple(side.bytes),
                side.max_s,
                side.max_bytes,
                side.same_as,
                side.max_ratio,
                tuple(side.cpu_s),
            )
            for side in found
        ),
        what,
    )
    for timed in run.timed:
        print(f"{timed.name:34} {timed.median_s:6.1f} s  {max(timed.bytes) / GIB:.2f} GiB  {timed.verdict}")
    if not arguments.dry:
        print(run.write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
