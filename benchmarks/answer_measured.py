"""The embedding alone on CPU ranks, on two versions of PyTorch in turns: whether what
docs/rowwise-or-colwise.md says of PyTorch's own styles holds on the oldest and the newest that shardwise is
for.

    python -m benchmarks.answer_measured --oldest .venv/bin/python --newest .venv-newest/bin/python

Each turn is a whole `python -m benchmarks.embedding` (its sides, checks and rounds) by that interpreter:
oldest, newest, oldest, newest. A version's times are those of all its turns; a ratio is of times of one
round.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.results import Result, Saved, Side, latest, now, read_result
from shardwise.core.measurement import Environment, Ratio
from shardwise.measure.statistics import paired_ratio

WHAT = "answer-measured"
TIMEOUT_S = 240
RATIOS = (
    ("rowwise@dtensor", "colwise@dtensor"),
    ("rowwise", "colwise"),
    ("rowwise@dtensor", "colwise"),
    ("rowwise@dtensor", "routed"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One style on one version: seconds of a round's slowest rank, over all turns; rows and columns of the
    table's gradient on a rank; bytes that a rank sends, by formula."""

    name: str
    median_s: float
    least_s: float
    most_s: float
    gradient_rows: int
    gradient_columns: int
    wire_bytes: float


@dataclass(frozen=True, slots=True)
class Version:
    """torch's, and what was measured on it. ratios: (slower, faster, the first's time over the second's)."""

    torch: str
    environment: Environment
    settings: dict[str, int | float | str]
    sides: tuple[Measured, ...]
    ratios: tuple[tuple[str, str, Ratio], ...]
    rounds: int
    checks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MeasuredRun(Saved):
    """A run of this benchmark."""

    command: str
    started: str
    versions: tuple[Version, ...]
    what: str = WHAT
    schema_version: int = 1


def turn(python: Path, rounds: int, tp: int) -> Result:
    """One run of benchmarks.embedding by an interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-m", "benchmarks.embedding", "--tp", str(tp), "--rounds", str(rounds)]
        subprocess.run(
            [*command, "--out", folder], check=True, timeout=TIMEOUT_S, stdout=sys.stderr, env=os.environ
        )
        return read_result(latest(f"embedding-tp{tp}", Path(folder)))


def version_of(turns: list[Result]) -> Version:
    """All turns of one interpreter."""
    first = turns[0]
    times = {
        side.name: tuple(seconds for each in turns for seconds in each.side(side.name).times_s)
        for side in first.sides
    }
    return Version(
        dict(first.environment.versions)["torch"],
        first.environment,
        first.settings,
        tuple(_measured(side, times[side.name]) for side in first.sides if side.facts),
        tuple((slow, fast, paired_ratio(times[slow], times[fast])) for slow, fast in RATIOS),
        sum(len(each.sides[0].times_s) for each in turns),
        first.checks,
    )


def _measured(side: Side, times: tuple[float, ...]) -> Measured:
    facts = side.facts
    return Measured(
        side.name,
        median(times),
        min(times),
        max(times),
        round(facts["gradient_rows"]),
        round(facts["gradient_columns"]),
        facts["wire_bytes"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answer_measured", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--oldest", type=Path, default=Path(sys.executable), help="an interpreter")
    parser.add_argument("--newest", type=Path, required=True, help="an interpreter")
    parser.add_argument("--turns", type=int, default=2, help="of each")
    parser.add_argument("--rounds", type=int, default=21, help="of each turn")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, and write no results file")
    given = parser.parse_args()
    started = now()
    found: tuple[list[Result], list[Result]] = ([], [])
    for _ in range(given.turns):
        for turns, python in zip(found, (given.oldest, given.newest), strict=True):
            turns.append(turn(python, given.rounds, given.tp))
    run = MeasuredRun(
        # where the interpreters lie is this machine's
        "python -m benchmarks.answer_measured --oldest PYTHON --newest PYTHON",
        started.isoformat(timespec="seconds"),
        tuple(map(version_of, found)),
    )
    for version in run.versions:
        print(version.torch)
        for side in version.sides:
            print(f"  {side.name:20} {side.median_s * 1e3:8.1f} ms")
        for slow, fast, ratio in version.ratios:
            print(f"  {slow} over {fast}: {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
    if not given.dry:
        print(f"written: {run.write()}")


if __name__ == "__main__":
    main()
