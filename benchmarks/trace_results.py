"""How fast profiler traces are read, beside the peer, as data, its file and its table. No torch, no
processes."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.results import RESULTS, as_json, latest, write_results
from shardwise.core.measurement import Environment

WHAT = "trace-read"
_GIB = 2**30

# the bars that the project set itself
MOST_CPU_S, MOST_BYTES = 2.5, 350_000_000
LEAST_CPU_RATIO, LEAST_MEMORY_RATIO = 10.0, 4.0


@dataclass(frozen=True, slots=True)
class Side:
    """One way to read the file, in a process of its own, once per round: seconds of all its CPUs, start to
    end, and its largest resident set."""

    name: str
    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """All sides of one run, interleaved. peer: the versions of what it runs on. ranks: (files, processes at
    once, seconds, largest process)."""

    environment: Environment
    rounds: int
    load_average: tuple[float, float]
    events: int
    file_bytes: int
    peer: str
    sides: tuple[Side, ...]
    ranks: tuple[tuple[int, int, float, int], ...]
    what: str = WHAT
    schema_version: int = 1

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this run; one of the same day is replaced."""
        return write_results(as_json(self), self.environment.started[:10], self.what, folder)


def newest_run(folder: Path = RESULTS) -> Run:
    """Raises FileNotFoundError where there is none."""
    return msgspec.json.decode(latest(WHAT, folder).read_bytes(), type=Run)


def verdict(values: list[float], bar: float, *, least: bool) -> str:
    """Of every round against the bar."""
    good = [value >= bar if least else value <= bar for value in values]
    middle = median(values)
    if all(good):
        return "met"
    return "met by the median only" if (middle >= bar if least else middle <= bar) else "**MISSED**"


def blocks(run: Run) -> dict[str, str]:
    """Name of a block -> its text. sides: ours plain, ours gzip, the peer plain."""
    head = "| read to a table | CPU s | range | wall s | GB |\n| --- | ---: | ---: | ---: | ---: |\n"
    rows = "".join(
        f"| {side.name} | {median(side.cpu_s):.2f} | {min(side.cpu_s):.2f} to {max(side.cpu_s):.2f} | "
        f"{median(side.wall_s):.2f} | {max(side.bytes) / 1e9:.2f} |\n"
        for side in run.sides
    )
    ours, peer = run.sides[0], run.sides[-1]
    cpu = [theirs / own for own, theirs in zip(ours.cpu_s, peer.cpu_s, strict=True)]
    memory = [theirs / own for own, theirs in zip(ours.bytes, peer.bytes, strict=True)]
    bars = (
        "\n| bar | found | verdict |\n| --- | --- | --- |\n"
        f"| at most {MOST_CPU_S} CPU s | {max(ours.cpu_s):.2f} in the slowest round | "
        f"{verdict(list(ours.cpu_s), MOST_CPU_S, least=False)} |\n"
        f"| at most {MOST_BYTES / 1e9:.2f} GB | {max(ours.bytes) / 1e9:.2f} | "
        f"{verdict([float(n) for n in ours.bytes], MOST_BYTES, least=False)} |\n"
        f"| {LEAST_CPU_RATIO:.0f} x less CPU than {run.peer} | {median(cpu):.1f} x ({min(cpu):.1f} to "
        f"{max(cpu):.1f}) | {verdict(cpu, LEAST_CPU_RATIO, least=True)} |\n"
        f"| {LEAST_MEMORY_RATIO:.0f} x less memory | {median(memory):.1f} x ({min(memory):.1f} to "
        f"{max(memory):.1f}) | {verdict(memory, LEAST_MEMORY_RATIO, least=True)} |\n"
    )
    ranks = "".join(
        f"- {files} rank files by {workers} process{'es' * (workers > 1)} at once: {wall:.1f} s, "
        f"{largest / 1e9:.2f} GB in the largest process\n"
        for files, workers, wall, largest in run.ranks
    )
    where = run.environment
    before, after = run.load_average
    about = (
        f"\nA made trace of {run.events:,} events, {run.file_bytes / 1e6:.0f} MB; whole processes, imports "
        f"included, {run.rounds} interleaved rounds. The peer's figure is its loading alone. "
        f"{where.machine}, {where.cores} cores, load average {before:.1f} before and {after:.1f} after.\n"
        f"\nSource: `benchmarks/results/{where.started[:10]}-{WHAT}.json`, made by `{where.command}`.\n"
    )
    return {f"benchmark-{WHAT}": head + rows + bars + "\n" + ranks + about}
