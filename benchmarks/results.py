"""A benchmark's result as data, the file it becomes, and the judgement of each stated bar. No torch, no
processes.

A ratio is paired: both times of a pair are of the same round. `speedup` is the other side's time over ours;
`cost` is our time over a floor's. A bar is met where the whole interval of the ratio is on its good side, met
by the median where only the median is.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TypeVar, assert_never

import msgspec

from shardwise.core.measurement import Environment, Ratio, TextSummary
from shardwise.measure.statistics import paired_ratio

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("shardwise", "torch", "numpy", "transformers", "tokenizers")
# What may change a time: threads, allocators, collectives.
VARIABLES = (
    "OMP_",
    "MKL_",
    "KMP_",
    "GLOO_",
    "NCCL_",
    "TORCH_",
    "PYTORCH_",
    "THP_",
    "MALLOC_",
    "GLIBC_",
    "LD_PRELOAD",
    "CUDA_",
)


class BarKind(StrEnum):
    """What a bar asks of a ratio."""

    SPEEDUP_AT_LEAST = "speedup at least"
    FASTER = "faster"
    NOT_SLOWER = "not slower"
    COST_AT_MOST = "cost at most"


@dataclass(frozen=True, slots=True)
class Bar:
    """`value` is the ratio asked for; 1 for faster and not slower."""

    kind: BarKind
    value: float = 1.0


class Verdict(StrEnum):
    MET = "met"
    MET_BY_MEDIAN = "met by the median only"
    MISSED = "MISSED"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides of one run, pair by pair; `bar` is None where none is stated."""

    ours: str
    other: str
    bar: Bar | None
    is_cost: bool
    ratio: Ratio
    ratios: tuple[float, ...]

    @property
    def verdict(self) -> Verdict | None:
        if self.bar is None:
            return None
        low, middle, high = self.ratio.low, self.ratio.median, self.ratio.high
        match self.bar.kind:
            case BarKind.SPEEDUP_AT_LEAST:
                return _judge(low >= self.bar.value, middle >= self.bar.value)
            case BarKind.FASTER:
                return _judge(low > 1, middle > 1)
            case BarKind.NOT_SLOWER:
                # the bar is that the interval doesn't lie wholly below 1; equal is as good as faster
                return Verdict.MET if high >= 1 else Verdict.MISSED
            case BarKind.COST_AT_MOST:
                return _judge(high <= self.bar.value, middle <= self.bar.value)
            case _:
                assert_never(self.bar.kind)


def _judge(whole_interval: bool, middle: bool) -> Verdict:
    return Verdict.MET if whole_interval else Verdict.MET_BY_MEDIAN if middle else Verdict.MISSED


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: every raw time of every rank, per round, and what else is known of it (units
    in the names)."""

    name: str
    about: str
    rank_times_s: tuple[tuple[float, ...], ...]
    facts: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()

    @property
    def times_s(self) -> tuple[float, ...]:
        """One time per round: its slowest rank's."""
        return tuple(max(times) for times in zip(*self.rank_times_s, strict=True))

    @property
    def median_s(self) -> float:
        return median(self.times_s)


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's run. `load_average`: of one minute, before and after; a busy machine shows there."""

    what: str
    settings: dict[str, int | float | str]
    environment: Environment
    load_average: tuple[float, float]
    text: TextSummary
    checks: tuple[str, ...]
    sides: tuple[Side, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    schema_version: int = 1

    def side(self, name: str) -> Side:
        return next(side for side in self.sides if side.name == name)

    @property
    def day(self) -> str:
        return self.environment.started[:10]

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this result; one of the same day and name is replaced."""
        summaries = {side.name: _summary(side) for side in self.sides}
        return write_results(
            as_json({**msgspec.to_builtins(self), "summaries": summaries}), self.day, self.what, folder
        )


def _summary(side: Side) -> dict[str, float]:
    """For readers of the file; read_result works it out anew from the raw times."""
    times = sorted(side.times_s)
    quarter = len(times) // 4
    return {
        "median_s": side.median_s,
        "smallest_s": times[0],
        "largest_s": times[-1],
        "lower_quartile_s": times[quarter],
        "upper_quartile_s": times[-1 - quarter],
    }


def read_result(path: Path) -> Result:
    return msgspec.json.decode(path.read_bytes(), type=Result)


def write_results(document: bytes, day: str, what: str, folder: Path = RESULTS) -> Path:
    """The file of a benchmark's run; one of the same day and name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}-{what}.json"
    path.write_bytes(document)
    return path


def as_json(value: object) -> bytes:
    """Indented, and ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def latest(what: str, folder: Path = RESULTS) -> Path:
    """The newest results file of a benchmark. FileNotFoundError where there is none."""
    found = sorted(folder.glob(f"????-??-??-{what}.json"))
    if not found:
        raise FileNotFoundError(
            f"{folder} has no results file of {what}: run its benchmark (see benchmarks/README.md)."
        )
    return found[-1]


class Saved:
    """A benchmark's run that has a results file: a dataclass with these fields. started: in ISO format."""

    __slots__ = ()
    started: str
    what: str

    @property
    def day(self) -> str:
        return self.started[:10]

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this run; one of the same day is replaced."""
        return write_results(as_json(self), self.day, self.what, folder)


Run = TypeVar("Run", bound=Saved)


def newest(kind: type[Run], what: str, folder: Path = RESULTS) -> Run:
    """The newest run that has a file. Raises FileNotFoundError where there is none."""
    return msgspec.json.decode(latest(what, folder).read_bytes(), type=kind)


def compare(
    sides: Sequence[Side], ours: str, other: str, bar: Bar | None = None, *, is_cost: bool = False
) -> Comparison:
    """Our side against another, in the direction that the bar asks for: our time over the other's for a cost,
    else the inverse."""
    by_name = {side.name: side.times_s for side in sides}
    numerator, denominator = (ours, other) if is_cost else (other, ours)
    pairs = tuple(value / base for value, base in zip(by_name[numerator], by_name[denominator], strict=True))
    return Comparison(
        ours, other, bar, is_cost, paired_ratio(by_name[numerator], by_name[denominator]), pairs
    )


def show(result: Result) -> None:
    """Prints medians and ratios, for the one who waits for them."""
    for side in result.sides:
        print(
            f"{side.name:32} {side.median_s * 1e3:9.1f} ms  ({min(side.times_s) * 1e3:.1f} to "
            f"{max(side.times_s) * 1e3:.1f})"
        )
    for comparison in result.comparisons:
        ratio, bar = comparison.ratio, comparison.bar
        stated = f"{bar.kind} {bar.value:g}: {comparison.verdict}" if bar else ""
        what = "cost over" if comparison.is_cost else "speedup over"
        print(
            f"{comparison.ours} {what} {comparison.other}: {ratio.median:.2f} [{ratio.low:.2f}, "
            f"{ratio.high:.2f}] {stated}"
        )


def rank_variables() -> tuple[tuple[str, str], ...]:
    """This process's environment variables that may change a time."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(VARIABLES)))


def describe_machine(
    command: str,
    world_size: int,
    threads_per_rank: int,
    variables: tuple[tuple[str, str], ...],
    started: datetime,
) -> Environment:
    """Where the ranks ran; `variables` are theirs, not this process's."""
    return Environment(
        command=command,
        started=started.isoformat(timespec="seconds"),
        machine=f"{_processor()}, {platform.system()} {platform.release()}",
        device="cpu",
        backend="gloo",
        world_size=world_size,
        threads_per_rank=threads_per_rank,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions=(
            ("python", platform.python_version()),
            *((name, _version(name)) for name in PACKAGES),
            ("commit", _commit()),
        ),
        variables=variables,
    )


def now() -> datetime:
    return datetime.now(UTC)


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def command_line(module: str) -> str:
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that was measured, `+` where the tree differed from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", "../src") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
