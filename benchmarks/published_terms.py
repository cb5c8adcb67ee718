"""Errors of published rows by term: what share of each group's steps predict gives to which work, whether the
error goes with it, and pairs of rows that differ in one thing, whose error is that thing's.

    share         median over a group's rows of a term's part of the predicted step
    correlation   Pearson's, over a group's rows, of the signed error with that share: near -1 where rows with
                  much of it are predicted too fast
    pairs         rows that agree in all but one setting. What is measured between the two belongs to what
                  that setting changes, and so does what predict says otherwise: errors common to both fall
                  out

No torch, no processes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import StatisticsError, correlation, median

from benchmarks.hf_results import table
from benchmarks.published_results import Predicted, Published, parts_of_groups

COMPUTE = ("matmul", "attention", "memory-bound kernels", "embedding", "clipping and optimizer")
PARTS = {
    "compute": COMPUTE,
    "of it attention": ("attention",),
    "tensor-parallel": ("tensor-parallel communication",),
    "data axes": ("data-parallel communication", "compute slowed by communication beside it"),
    "bubble": ("pipeline bubble",),
    "launches": ("waiting for launches",),
}
"""Columns, by the terms that they add up."""

FEWEST = 6  # rows of which a correlation is shown
SEEN = 0.01  # of the step: a share that varies by less tells nothing


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows that differ in `name` alone. of: what must agree; by: what orders them; per: what a step is
    divided by, so that equal work is compared. books: the term that their difference is booked on."""

    name: str
    books: str
    of: Callable[[Predicted], tuple[object, ...]]
    by: Callable[[Predicted], float]
    per: Callable[[Predicted], float] = lambda _: 1.0


def _shape(row: Predicted) -> tuple[object, ...]:
    return (row.group, row.model, row.gpu, row.seq, row.recompute, row.hidden, row.layers)


def _how(row: Predicted) -> tuple[object, ...]:
    return (row.precision, row.compiled, row.overlap)


def _count(row: Predicted) -> int:
    return row.global_batch // (row.dp * row.micro_batch)


DIFFERENCES = (
    Difference(
        "more replicas",
        "data axes, and waiting for more ranks",
        lambda row: (*_shape(row), *_how(row), row.tp, row.pp, row.cp, row.ep, row.micro_batch, _count(row)),
        lambda row: row.dp,
    ),
    Difference(
        "more micro-batches",
        "what a step does once: bubble, optimizer, gradients' sums",
        lambda row: (*_shape(row), *_how(row), row.tp, row.pp, row.dp, row.cp, row.ep, row.micro_batch),
        _count,
        _count,
    ),
    Difference(
        "a larger micro-batch",
        "launches, and how well kernels fill the device",
        lambda row: (*_shape(row), *_how(row), row.tp, row.pp, row.dp, row.cp, row.ep, row.global_batch),
        lambda row: row.micro_batch,
    ),
    Difference(
        "collectives over tp overlapped",
        "tensor-parallel",
        lambda row: (
            *_shape(row), row.precision, row.compiled, row.tp, row.pp, row.dp, row.cp, row.micro_batch,
            row.global_batch,
        ),
        lambda row: float(row.overlap not in ("", "none")),
    ),
    Difference(
        "float8 instead of bfloat16",
        "matmuls' rate, and casts",
        lambda row: (
            *_shape(row), row.overlap, row.compiled, row.tp, row.pp, row.dp, row.cp, row.micro_batch,
            row.global_batch,
        ),
        lambda row: float("8" in row.precision),
    ),
    Difference(
        "tp doubled, dp halved",
        "tensor-parallel, beside data axes",
        lambda row: (
            *_shape(row), *_how(row), row.pp, row.cp, row.ep, row.micro_batch, row.gpus, _count(row),
        ),
        lambda row: row.tp,
        lambda row: row.dp,
    ),
)  # fmt: skip


def share(row: Predicted, part: str) -> float:
    """Of the predicted step."""
    terms = dict(row.terms)
    return sum(terms.get(name, 0.0) for name in PARTS[part]) / row.predicted_s


def terms_table(rows: Sequence[Predicted]) -> str:
    """Each group's shares, and beside them how the error goes with each."""
    lines = []
    for name, part, chosen in parts_of_groups(rows):
        error = median(row.error for row in chosen)
        lines.append([name, part, str(len(chosen)), _signed(error), *(_cell(chosen, each) for each in PARTS)])
    return table(["group", "rows", "number", "error", *PARTS], lines, numbers=tuple(range(2, 4 + len(PARTS))))


def _cell(rows: Sequence[Predicted], part: str) -> str:
    shares = [share(row, part) for row in rows]
    shown = f"{median(shares):.0%}"
    if len(rows) < FEWEST or max(shares) - min(shares) < SEEN:
        return shown
    try:
        return f"{shown}, {correlation(shares, [row.error for row in rows]):+.2f}"
    except StatisticsError:  # all errors alike
        return shown


@dataclass(frozen=True, slots=True)
class Booked:
    """Pairs of one group that differ in one thing: medians of what the second takes over the first, less
    one."""

    difference: Difference
    group: str
    pairs: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return (1 + self.predicted) / (1 + self.measured) - 1


def booked(rows: Iterable[Predicted]) -> list[Booked]:
    """By group and difference. A pair: neighbours in what orders them."""
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    listed = list(rows)
    for index, difference in enumerate(DIFFERENCES):
        alike: dict[tuple[object, ...], dict[float, Predicted]] = defaultdict(dict)
        for row in listed:
            alike[difference.of(row)].setdefault(difference.by(row), row)
        for each in alike.values():
            ordered = [each[key] for key in sorted(each)]
            for one, other in pairwise(ordered):
                scale = difference.per(one) / difference.per(other)
                found[index, one.group].append(
                    (
                        other.measured_s / one.measured_s * scale - 1,
                        other.predicted_s / one.predicted_s * scale - 1,
                    )
                )
    return [
        Booked(
            DIFFERENCES[index],
            group,
            len(pairs),
            median(measured for measured, _ in pairs),
            median(predicted for _, predicted in pairs),
        )
        for (index, group), pairs in sorted(found.items())
    ]


def pairs_table(rows: Iterable[Predicted]) -> str:
    lines = [
        [
            each.difference.name,
            each.group,
            str(each.pairs),
            _signed(each.measured),
            _signed(each.predicted),
            _signed(each.error),
            each.difference.books,
        ]
        for each in booked(rows)
    ]
    head = ["what differs", "group", "pairs", "measured", "predicted", "error of the change", "booked on"]
    return table(head, lines, numbers=(2, 3, 4, 5))


def _signed(value: float) -> str:
    return f"{value * 100:+.1f} %"


def blocks(run: Published) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    source = f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    return {
        "benchmark-published-terms": terms_table(run.rows) + source,
        "benchmark-published-pairs": pairs_table(run.rows) + source,
    }
