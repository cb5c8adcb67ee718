"""How long whole commands take and what memory they need, as data, the file and the table: of `shardwise
explain`, and of `shardwise plan`. No torch, no processes."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.results import RESULTS, as_json, latest, write_results
from shardwise.core.measurement import Environment

WHAT = "explain-speed"
PLAN = "plan-speed"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Timed:
    """One command from start to end, imports included, once per round; max_s and max_bytes are the bars
    (None: none stated).

    bytes: the largest resident set of the process, of every round.
    """

    name: str
    command: str
    wall_s: tuple[float, ...]
    bytes: tuple[int, ...]
    max_s: float | None = None
    max_bytes: int | None = None
    same_as: str | None = None  # the name of the command whose time it should have, within noise
    max_ratio: float | None = None  # or that times its own, at most
    cpu_s: tuple[float, ...] = ()  # of a core, which other processes take nothing from

    @property
    def median_s(self) -> float:
        return median(self.wall_s)

    @property
    def verdict(self) -> str:
        if self.max_s is None:
            return ""
        fits = self.max_bytes is None or max(self.bytes) <= self.max_bytes
        if max(self.wall_s) <= self.max_s and fits:
            return "met"
        return "met by the median only" if self.median_s <= self.max_s and fits else "**MISSED**"


@dataclass(frozen=True, slots=True)
class Run:
    """All commands of one run, interleaved."""

    environment: Environment
    rounds: int
    load_average: tuple[float, float]
    timed: tuple[Timed, ...]
    what: str = WHAT
    schema_version: int = 1

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this run; one of the same day is replaced."""
        return write_results(as_json(self), self.environment.started[:10], self.what, folder)


def newest_run(folder: Path = RESULTS, what: str = WHAT) -> Run:
    """Raises FileNotFoundError where there is none."""
    return msgspec.json.decode(latest(what, folder).read_bytes(), type=Run)


def blocks(run: Run) -> dict[str, str]:
    """Name of a block -> its text."""
    has_cpu = all(timed.cpu_s for timed in run.timed)
    head = ["command", "median s", "range s", *["CPU s"] * has_cpu, "GiB", "bar", "verdict"]
    rows = [
        [
            f"`{timed.command}`",
            f"{timed.median_s:.1f}",
            f"{min(timed.wall_s):.1f} to {max(timed.wall_s):.1f}",
            *([f"{median(timed.cpu_s):.1f}"] if has_cpu else []),
            f"{max(timed.bytes) / _GIB:.2f}",
            _bar(timed),
            timed.verdict,
        ]
        for timed in run.timed
    ]
    rule = ["---", "---:", "---:", *["---:"] * has_cpu, "---:", "---", "---"]
    table = "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))
    before, after = run.load_average
    where = run.environment
    about = (
        f"\nWhole commands, imports included, {run.rounds} interleaved rounds; a verdict is met where the "
        f"slowest round meets the bar. {where.machine}, {where.cores} cores, load average {before:.1f} "
        f"before and {after:.1f} after; torch {dict(where.versions)['torch']}.\n"
        f"\nSource: `benchmarks/results/{where.started[:10]}-{run.what}.json`, made by `{where.command}`.\n"
    )
    return {f"benchmark-{run.what}": table + _pairs(run) + about}


def _pairs(run: Run) -> str:
    """A line for each command whose time is held to another's: paired by round, with what that other's own
    rounds differ by."""
    by_name = {timed.name: timed for timed in run.timed}
    lines = []
    for timed in run.timed:
        if timed.same_as is not None:
            base = by_name[timed.same_as]
            ratios = [own / other for own, other in zip(timed.wall_s, base.wall_s, strict=True)]
            noise = [wall / base.median_s for wall in base.wall_s]
            lines.append(
                f"- {timed.name}: {median(ratios):.2f} of the time of {base.name} (rounds "
                f"{min(ratios):.2f} to {max(ratios):.2f}; the rounds of {base.name} are {min(noise):.2f} "
                f"to {max(noise):.2f} of their own median){_cpu(timed, base)}{_ratio_bar(timed, ratios)}\n"
            )
    return "\n" + "".join(lines) if lines else ""


def _cpu(timed: Timed, base: Timed) -> str:
    """What other processes take nothing from."""
    if not (timed.cpu_s and base.cpu_s):
        return ""
    return f"; {median(timed.cpu_s) / median(base.cpu_s):.2f} of its CPU seconds"


def _ratio_bar(timed: Timed, ratios: list[float]) -> str:
    if timed.max_ratio is None:
        return ""
    word = "met" if max(ratios) <= timed.max_ratio else "met by the median only"
    verdict = word if median(ratios) <= timed.max_ratio else "**MISSED**"
    return f"; bar: at most {timed.max_ratio:g}: {verdict}"


def _bar(timed: Timed) -> str:
    parts = []
    if timed.max_s is not None:
        parts.append(f"at most {timed.max_s:g} s")
    if timed.max_bytes is not None:
        parts.append(f"{timed.max_bytes / _GIB:.1f} GiB")
    return ", ".join(parts)
