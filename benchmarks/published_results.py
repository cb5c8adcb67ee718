"""Predicted against published step times as data, its file, tables, and plot. No torch, no processes.

Errors are signed: predicted / measured - 1. Kendall's tau-b (Kendall 1945) is of throughput (sequences a
second), within rows of equal model and GPU count.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, median

from benchmarks.results import RESULTS, Saved, newest

WHAT = "published"
TENSOR_TERM = "tensor-parallel communication"


@dataclass(frozen=True, slots=True)
class Predicted:
    """One published row and what predict says of it. left_out_s: without the constants that were fitted to
    its group. terms: name, seconds. overlap: of collectives over tp, as published."""

    group: str
    model: str
    gpu: str
    gpus: int
    tp: int
    pp: int
    dp: int
    micro_batch: int
    global_batch: int
    hidden: int
    layers: int
    precision: str
    recompute: str
    measured_s: float
    predicted_s: float
    left_out_s: float
    terms: tuple[tuple[str, float], ...]
    measured_gib: float | None
    memory_kind: str
    active_gib: float
    reserved_gib: float
    cp: int = 1
    ep: int = 1
    seq: int = 0
    compiled: bool = False
    overlap: str = ""

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def left_out_error(self) -> float:
        return self.left_out_s / self.measured_s - 1

    @property
    def memory_error(self) -> float | None:
        """Where the row says which kind it measured: of active (allocated) or reserved bytes."""
        if self.measured_gib is None:
            return None
        if self.memory_kind.startswith("allocated"):
            return self.active_gib / self.measured_gib - 1
        if self.memory_kind.startswith("torch max_reserved"):
            return self.reserved_gib / self.measured_gib - 1
        return None


@dataclass(frozen=True, slots=True)
class NotTaken:
    """Rows over cp, ep or pp that aren't predicted, and why. over: those axes."""

    group: str
    model: str
    over: str
    reason: str
    rows: int


@dataclass(frozen=True, slots=True)
class Published(Saved):
    """A run over all usable rows."""

    command: str
    started: str
    seconds: float
    rows: tuple[Predicted, ...]
    not_taken: tuple[NotTaken, ...] = ()
    what: str = WHAT
    schema_version: int = 1


def newest_run(folder: Path = RESULTS) -> Published:
    """Raises FileNotFoundError where there is none."""
    return newest(Published, WHAT, folder)


def with_others(made: Sequence[Predicted], before: Sequence[Predicted]) -> list[Predicted]:
    """Rows predicted anew, in the places of those of an earlier run that are of the same published run; what
    that one hasn't comes last."""
    anew = {_identity(row): row for row in made}
    kept = [anew.pop(_identity(row), row) for row in before]
    return [*kept, *anew.values()]


def _identity(row: Predicted) -> tuple[object, ...]:
    degrees = (row.gpus, row.tp, row.pp, row.dp, row.micro_batch, row.global_batch)
    return (row.group, row.model, row.gpu, *degrees, row.precision, row.recompute, row.measured_s)


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def with_tensor_parallel(run: Published) -> list[Predicted]:
    return [row for row in run.rows if row.tp > 1]


def groups_of(rows: Iterable[Predicted]) -> dict[str, list[Predicted]]:
    found: dict[str, list[Predicted]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return dict(sorted(found.items()))


def parts_of_groups(rows: Iterable[Predicted]) -> Iterator[tuple[str, str, list[Predicted]]]:
    """(group, part, rows) of those that there are: with tensor parallelism, without, and mixtures."""
    for name, group in groups_of(rows).items():
        parts = {
            "TP > 1": [row for row in group if row.tp > 1 and row.ep == 1],
            "TP 1": [row for row in group if row.tp == 1 and row.ep == 1],
            "experts": [row for row in group if row.ep > 1],
        }
        yield from ((name, part, own) for part, own in parts.items() if own)


def group_median(rows: Sequence[Predicted]) -> float:
    """Median over groups of each group's median absolute error, each predicted without what was fitted to
    it."""
    return median(median(abs(row.left_out_error) for row in group) for group in groups_of(rows).values())


def kendall(rows: Sequence[Predicted]) -> float | None:
    """tau-b of predicted against measured throughput; None where nothing can be ordered."""
    agree = differ = ties_one = ties_other = 0
    pairs = [(row.global_batch / row.measured_s, row.global_batch / row.predicted_s) for row in rows]
    for index, (one, other) in enumerate(pairs):
        for one_before, other_before in pairs[:index]:
            first, second = _sign(one - one_before), _sign(other - other_before)
            agree += first * second > 0
            differ += first * second < 0
            ties_one += first == 0 and second != 0
            ties_other += second == 0 and first != 0
    total = sqrt((agree + differ + ties_one) * (agree + differ + ties_other))
    return (agree - differ) / total if total else None


def taus(rows: Sequence[Predicted]) -> dict[tuple[str, int, int, int], float]:
    """(group, hidden, layers, GPUs) -> tau, of vTrain's rows, which sweep degrees on equal models and GPU
    counts."""
    found: dict[tuple[str, int, int, int], list[Predicted]] = defaultdict(list)
    for row in rows:
        if row.group.startswith("vtrain"):
            found[row.group, row.hidden, row.layers, row.gpus].append(row)
    each = {key: kendall(group) for key, group in found.items()}
    return {key: tau for key, tau in each.items() if tau is not None}


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def hidden_share(run: Published) -> float:
    """What async TP saves over the tensor-parallel communication predicted without it: median over
    torchtitan's pairs of rows that differ in that alone.

    A pair: neighbours in the file with equal configuration, the second with async TP (its predicted
    communication is less)."""
    saved = []
    rows = [row for row in run.rows if row.group == "torchtitan-benchmarks" and row.tp > 1]
    for plain, hidden in pairwise(rows):
        same = (plain.model, plain.precision, plain.gpus) == (hidden.model, hidden.precision, hidden.gpus)
        before, after = (dict(row.terms).get(TENSOR_TERM, 0.0) for row in (plain, hidden))
        if same and after < before:
            saved.append((plain.measured_s - hidden.measured_s) / before)
    return median(saved)


def host_error(run: Published) -> float:
    """Mean absolute error of the runs that the vTrain cluster's host was fitted to, each size of a
    micro-batch counting alike."""
    sizes = [[abs(row.error) for row in _fitted_to(run) if row.micro_batch == size] for size in (1, 2)]
    return fmean(fmean(errors) for errors in sizes)


def head_error(run: Published, size: int) -> float:
    """Signed error of what a step of those models takes beside its layers (twice that of 12 layers less that
    of 24), at two micro-batches of this size: nearly all of it is the head, whose rows begin at odd
    places."""
    steps = {
        row.layers: row
        for row in _fitted_to(run)
        if row.micro_batch == size and row.global_batch == 2 * size * row.dp
    }
    predicted_s, measured_s = (
        2 * getattr(steps[12], name) - getattr(steps[24], name) for name in ("predicted_s", "measured_s")
    )
    return float(predicted_s / measured_s - 1)


def _fitted_to(run: Published) -> list[Predicted]:
    """The rows that constants of the vTrain cluster are fitted to."""
    return [
        row
        for row in run.rows
        if row.group == "vtrain-single" and (row.hidden, row.tp, row.pp, row.dp) == (1024, 1, 1, 2)
    ]
