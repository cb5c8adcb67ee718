"""Published runs that differ only in how they are sharded, and how well predictions compare them. No torch,
no processes.

A group: rows of measurements.csv that agree in every column but degrees, micro-batch, what a data axis
shards, and what was measured. The error of a machine file is that of ratios: for two runs of a group, how far
the predicted ratio of their steps is from the measured one, as a share; the median over all pairs. Where
there are fewer than ENOUGH of them, it is that of runs; where there are fewer of those too, nothing is said.
Runs of models that a constant of the machine was fitted to don't count.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from benchmarks.published_jobs import Row, machine_of, number
from benchmarks.published_results import Predicted, Published

SHARDED = ("tp", "sp", "pp", "vp", "dp", "dp_kind", "cp", "ep", "micro_batch", "grad_accum")
"""The columns that say how a run is sharded."""

MEASURED = ("step_time_s", "peak_mem_gib", "mem_kind", "date", "source")
ENOUGH = 10


@dataclass(frozen=True, slots=True)
class Alike:
    """Runs of one model, batch and number of GPUs, which differ only in how they are sharded."""

    rows: tuple[Predicted, ...]

    @property
    def first(self) -> Predicted:
        return self.rows[0]


@dataclass(frozen=True, slots=True)
class MachineError:
    """Median absolute error of a machine's predictions, over so many pairs of runs (or runs)."""

    share: float
    count: int
    of: str  # "pairs" or "runs"
    groups: tuple[str, ...]

    def __str__(self) -> str:
        what = f"steps of {self.count} runs"
        if self.of == "pairs":
            what = f"ratios of {self.count} pairs of runs that differ only in how they are sharded"
        return f"median of predicted against measured {what} ({', '.join(self.groups)})"


def alike(run: Published, rows: Iterable[Row]) -> list[Alike]:
    """All groups of at least two runs. rows: of measurements.csv."""
    known = {_identity_of(row): row for row in run.rows}
    found: dict[tuple[tuple[str, str], ...], list[Predicted]] = defaultdict(list)
    for row in rows:
        made = known.get(_identity(row)) if row["step_time_s"] else None
        if made is not None:
            same = tuple((key, value) for key, value in row.items() if key not in SHARDED + MEASURED)
            found[same].append(made)
    return [Alike(tuple(each)) for each in found.values() if len(each) > 1]


def was_fitted(row: Predicted) -> bool:
    """Whether a constant of its machine was fitted to runs of its model (benchmarks/machine_files.py: the
    host of vTrain's cluster)."""
    return row.group == "vtrain-single" and row.hidden == 1024


def ratio_errors(group: Alike) -> list[float]:
    """Of each pair of runs: how far the predicted ratio of their steps is from the measured one."""
    return [abs((1 + one.error) / (1 + other.error) - 1) for one, other in combinations(group.rows, 2)]


def machine_errors(run: Published, rows: Iterable[Row]) -> dict[str, MachineError]:
    """By machine file; none for machines on which too few runs were measured."""
    pairs: dict[str, list[float]] = defaultdict(list)
    single: dict[str, list[float]] = defaultdict(list)
    names: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for group in alike(run, rows):
        machine = machine_of(group.first.group, group.first.gpu)
        if not was_fitted(group.first):
            pairs[machine] += ratio_errors(group)
            names[machine]["pairs"].add(group.first.group)
    for row in run.rows:
        if not was_fitted(row):
            single[machine_of(row.group, row.gpu)].append(abs(row.left_out_error))
            names[machine_of(row.group, row.gpu)]["runs"].add(row.group)
    return {
        machine: _error(pairs[machine], errors, names[machine])
        for machine, errors in sorted(single.items())
        if max(len(errors), len(pairs[machine])) >= ENOUGH
    }


def _error(pairs: Sequence[float], single: Sequence[float], names: dict[str, set[str]]) -> MachineError:
    of, errors = ("pairs", pairs) if len(pairs) >= ENOUGH else ("runs", single)
    return MachineError(median(errors), len(errors), of, tuple(sorted(names[of])))


def _identity(row: Row) -> tuple[object, ...]:
    degrees = tuple(number(row, key) for key in ("n_gpus", "tp", "pp", "dp", "micro_batch", "global_batch"))
    others = (number(row, "cp", 1) or 1, number(row, "ep", 1) or 1)
    named = (row["source_group"], row["model"], row["gpu"], row["precision"], row["ac"])
    return (*named, *degrees, *others, float(row["step_time_s"]))


def _identity_of(row: Predicted) -> tuple[object, ...]:
    degrees = (row.gpus, row.tp, row.pp, row.dp, row.micro_batch, row.global_batch, row.cp, row.ep)
    return (row.group, row.model, row.gpu, row.precision, row.recompute, *degrees, row.measured_s)
