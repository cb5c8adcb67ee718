"""What following predict would have cost: of published runs that differ only in how they are sharded, the
measured step of the one that predict says is fastest, over the fastest measured one, less one.

    python -m benchmarks.regret     from the newest results file of benchmarks.published; writes
                                    results/DATE-regret.json (a second)

Groups are those of benchmarks/alike.py with at least three runs. The pick is the least predicted step,
however close others are: a tie is no excuse. Predictions are by the machine files that ship; what is fitted
to whole runs is fitted to runs of vTrain with TP 1 (benchmarks/vtrain_host.py), and comes out the same
without the runs of any one model.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks import published_results
from benchmarks.alike import Alike, alike
from benchmarks.hf_results import table
from benchmarks.published_jobs import read_rows
from benchmarks.published_results import Predicted, quantile
from benchmarks.results import RESULTS, Saved, command_line, newest, now

WHAT = "regret"
FEWEST = 3
MEAN, NINETY, WORST = 0.03, 0.08, 0.2  # the bars
MISS = NINETY
_LARGE, _NODE = 8192, 8  # numbers of a token, GPUs


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a group: its degrees and steps."""

    tp: int
    pp: int
    dp: int
    cp: int
    micro_batch: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    def __str__(self) -> str:
        degrees = f"{self.tp}/{self.pp}/{self.dp}" + (f"/{self.cp}" if self.cp > 1 else "")
        return f"{degrees}, {self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Regret:
    """Of one group. runs: how many it has. pick: what predict says is fastest; best: what was."""

    group: str
    model: str
    gpu: str
    gpus: int
    global_batch: int
    hidden: int
    runs: int
    pick: Run
    best: Run

    @property
    def share(self) -> float:
        return self.pick.measured_s / self.best.measured_s - 1


@dataclass(frozen=True, slots=True)
class Regrets(Saved):
    command: str
    started: str
    seconds: float
    source: str
    groups: tuple[Regret, ...]
    what: str = WHAT
    schema_version: int = 1


def newest_run(folder: Path = RESULTS) -> Regrets:
    """Raises FileNotFoundError where there is none."""
    return newest(Regrets, WHAT, folder)


def regret_of(group: Alike) -> Regret:
    """Of equally fast predictions the first run counts, as published."""
    pick = min(group.rows, key=lambda row: row.predicted_s)
    best = min(group.rows, key=lambda row: row.measured_s)
    first = group.first
    named = (first.group, first.model, first.gpu, first.gpus, first.global_batch, first.hidden)
    return Regret(*named, len(group.rows), _run(pick), _run(best))


def _run(row: Predicted) -> Run:
    degrees = (row.tp, row.pp, row.dp, row.cp, row.micro_batch)
    return Run(*degrees, row.measured_s, row.predicted_s)


def summary(run: Regrets) -> str:
    shares = [each.share for each in run.groups]
    found = (
        ("mean", fmean(shares), MEAN),
        ("90 % of the groups within", quantile(shares, 0.9), NINETY),
        ("worst", max(shares), WORST),
    )
    said = "; ".join(
        f"{name} {_percent(value)} (bar: {_percent(bar)}{'' if value <= bar else ', **missed**'})"
        for name, value, bar in found
    )
    right = sum(share == 0 for share in shares)
    return (
        f"{len(shares)} groups of {sum(each.runs for each in run.groups)} published runs: {said}. In {right} "
        "of them the pick is the measured best."
    )


def blocks(run: Regrets) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    name = f"benchmarks/results/{run.day}-{run.what}.json"
    source = f"\nSource: `{name}`, made by `{run.command}` of `{run.source}`.\n"
    return {
        f"benchmark-{WHAT}": f"{summary(run)}\n\n{families_table(run.groups)}{source}",
        f"benchmark-{WHAT}-misses": misses_table(run.groups) + source,
        f"benchmark-{WHAT}-sweeps": runs_table([each for each in run.groups if _is_large(each)]) + source,
    }


def families_table(groups: Sequence[Regret]) -> str:
    families: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in groups:
        width = f"{each.hidden} wide" if each.group.startswith("vtrain") else "all"
        families[each.group, width].append(each.share)
    lines = [
        [*name, str(len(each)), _percent(fmean(each)), _percent(quantile(each, 0.9)), _percent(max(each))]
        for name, each in sorted(families.items())
    ]
    head = ["runs of", "models", "groups", "mean", "90 % within", "worst"]
    return table(head, lines, numbers=(2, 3, 4, 5))


def misses_table(groups: Sequence[Regret]) -> str:
    """Every group whose regret is more than most may have."""
    return runs_table([each for each in groups if each.share > MISS])


def _is_large(group: Regret) -> bool:
    """Whether the sweep was of layers as large models have them, or over several nodes."""
    return group.hidden >= _LARGE or group.gpus > _NODE


def runs_table(groups: Sequence[Regret]) -> str:
    """The pick and the best of each group, the largest regret first."""
    lines = [
        [
            each.model,
            str(each.gpus),
            str(each.global_batch),
            str(each.runs),
            str(each.pick),
            *_steps(each.pick),
            str(each.best),
            *_steps(each.best),
            _percent(each.share),
        ]
        for each in sorted(groups, key=lambda each: -each.share)
    ]
    head = ["model", "GPUs", "batch", "runs"]
    for which in ("pick", "best"):
        head += [f"{which}: tp/pp/dp, micro-batch", "measured", "predicted"]
    return table([*head, "regret"], lines, numbers=(1, 2, 3, 5, 6, 8, 9, 10))


def _steps(run: Run) -> tuple[str, str]:
    return f"{run.measured_s * 1e3:.0f} ms", f"{run.predicted_s * 1e3:.0f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main() -> int:
    started, began = now(), time.perf_counter()
    published = published_results.newest_run()
    groups = [group for group in alike(published, read_rows()) if len(group.rows) >= FEWEST]
    run = Regrets(
        command_line("benchmarks.regret"),
        started.isoformat(timespec="seconds"),
        round(time.perf_counter() - began, 1),
        f"benchmarks/results/{published.day}-{published.what}.json",
        tuple(regret_of(group) for group in groups),
    )
    print(summary(run))
    print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
