"""Predicted against published step times as data, its file, tables, and plot. No torch, no processes.

Errors are signed: predicted / measured - 1. Kendall's tau-b (Kendall 1945) is of throughput (sequences a
second), within rows of equal model and GPU count.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10, sqrt
from pathlib import Path
from statistics import fmean, median

from benchmarks.hf_results import table
from benchmarks.results import RESULTS, Saved, newest

WHAT = "published"
WORST = 12
PEERS = (
    Path(__file__).parent / "data" / "peers.csv"
)  # measured once for this project, with the tools as they come: no command here makes them
TENSOR_TERM = "tensor-parallel communication"
PLOT = Path(__file__).parent.parent / "docs" / "example" / "published.svg"


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


def summary(run: Published) -> str:
    """What the bars ask, in sentences."""
    rows = with_tensor_parallel(run)
    if not rows:
        return (
            f"{len(run.rows)} rows, none with TP > 1: median absolute error "
            f"{_share(median(abs(row.error) for row in run.rows))}."
        )
    errors = [abs(row.error) for row in rows]
    found = taus(rows)
    order = (
        f" Mean Kendall tau within {len(found)} vTrain groups of equal model and GPU count: "
        f"{fmean(found.values()):.2f} (bar: 0.8)."
        if found
        else ""
    )
    return (
        f"{len(run.rows)} usable rows, {len(rows)} of them with TP > 1. With TP > 1: median absolute error "
        f"{_share(median(errors))} (bar: 10 %), 90 % of the rows within {_share(quantile(errors, 0.9))} "
        f"(bar: 25 %). Median over {len(groups_of(rows))} groups of each group's median, without what was "
        f"fitted to the group: {_share(group_median(rows))} (bar: 12 %).{order}"
    )


def blocks(run: Published) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    source = (
        f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}` in "
        f"{run.seconds / 60:.0f} minutes.\n"
    )
    tensor = with_tensor_parallel(run)
    return {
        f"benchmark-{WHAT}": summary(run) + "\n" + source,
        f"benchmark-{WHAT}-groups": _groups_table(run.rows) + source,
        f"benchmark-{WHAT}-peers": _peers_table(run) + source,
        f"benchmark-{WHAT}-worst": _worst_table(tensor) + source,
        f"benchmark-{WHAT}-memory": _memory_table(run.rows) + source,
        f"benchmark-{WHAT}-order": _order_table(tensor) + source,
        f"benchmark-{WHAT}-axes": axes_table(run.rows) + source,
        f"benchmark-{WHAT}-experts": experts_table(run.rows) + source,
        f"benchmark-{WHAT}-not-taken": not_taken_table(run) + source,
    }


def _groups_table(rows: Sequence[Predicted]) -> str:
    lines = []
    for name, group in groups_of(rows).items():
        for title, chosen in (
            ("TP > 1", [row for row in group if row.tp > 1 and row.ep == 1]),
            ("TP 1", [row for row in group if row.tp == 1 and row.ep == 1]),
            ("experts", [row for row in group if row.ep > 1]),
        ):
            if chosen:
                errors = [row.error for row in chosen]
                gpus = ", ".join(sorted({row.gpu for row in chosen}))
                absolute = [abs(error) for error in errors]
                without = median(abs(row.left_out_error) for row in chosen)
                lines.append(
                    [
                        name,
                        title,
                        gpus,
                        str(len(chosen)),
                        _signed(median(errors)),
                        _share(median(absolute)),
                        _share(quantile(absolute, 0.9)),
                        _share(without),
                    ]
                )
    head = [
        "group",
        "rows",
        "GPU",
        "number",
        "median, signed",
        "median, absolute",
        "90 % within",
        "without its fits",
    ]
    return table(head, lines, numbers=(3, 4, 5, 6, 7))


def _peers_table(run: Published) -> str:
    """Other tools' errors beside ours, on the same kind of rows."""
    rows = with_tensor_parallel(run)
    ours = {
        "vTrain, several nodes": [row for row in rows if row.group == "vtrain-multi"],
        "all with TP > 1": rows,
    }
    lines = []
    for name, group in ours.items():
        errors = [abs(row.error) for row in group]
        if errors:
            lines.append([name, "**shardwise**", _share(median(errors)), _share(quantile(errors, 0.9))])
    with PEERS.open(encoding="utf-8", newline="") as file:
        lines += [
            [row["rows"], row["tool"], f"{row['median_percent']} %", f"{row['p90_percent']} %"]
            for row in csv.DictReader(file)
        ]
    return table(["rows", "tool", "median, absolute", "90 % within"], sorted(lines), numbers=(2, 3))


def why(row: Predicted) -> str:
    """The likely reason of a large error, by the configuration and the terms alone; said as unexplained where
    there is none."""
    terms = dict(row.terms)
    launch = terms.get("waiting for launches", 0.0) / row.predicted_s
    if row.precision == "float8 rowwise":
        return (
            "what CUTLASS' kernel with a scale per row lost at long summed dims (PyTorch's issue 153809) "
            "isn't published as numbers"
        )
    if row.group.startswith("vtrain") and row.tp == 8 and launch > 0.3:
        return "the hosts of 8 ranks wait for each other at every all-reduce; waiting isn't modelled"
    exchanged = terms.get("expert-parallel communication", 0.0) / row.predicted_s
    if row.model.startswith("GPT OSS") and row.error < -0.1:
        return "its sinks and biases, and the trainer's own kernels for both, aren't in the traced model"
    if row.ep > 1 and row.error > 0.1 and exchanged > 0.1:
        return (
            f"nothing hides the exchange of tokens here ({exchanged:.0%} of the predicted step); the trainer "
            "may run it beside other work"
        )
    if row.ep > 1 and abs(row.error) <= 0.1:
        return ""
    if launch > 0.3:
        return f"launch-bound ({launch:.0%} of the step): the host's time per op is one constant"
    return "unexplained"


def _worst_table(rows: Sequence[Predicted]) -> str:
    worst = sorted(rows, key=lambda row: -abs(row.error))[:WORST]
    lines = [
        [
            row.group,
            row.model,
            str(row.gpus),
            f"{row.tp}/{row.pp}/{row.dp}",
            str(row.micro_batch),
            row.precision,
            f"{row.measured_s:.3g} s",
            f"{row.predicted_s:.3g} s",
            _signed(row.error),
            why(row),
        ]
        for row in worst
    ]
    head = [
        "group",
        "model",
        "GPUs",
        "tp/pp/dp",
        "micro-batch",
        "precision",
        "measured",
        "predicted",
        "error",
        "likely reason",
    ]
    return table(head, lines, numbers=(2, 4, 6, 7, 8))


def _memory_table(rows: Sequence[Predicted]) -> str:
    lines = []
    known = [row for row in rows if row.memory_error is not None]
    for name, group in groups_of(known).items():
        for title, kind in (("active", "allocated"), ("reserved", "torch max_reserved")):
            errors = [
                row.memory_error
                for row in group
                if row.memory_kind.startswith(kind) and row.memory_error is not None
            ]
            if errors:
                within = [sum(abs(error) <= share for error in errors) for share in (0.05, 0.1)]
                lines.append(
                    [
                        name,
                        title,
                        str(len(errors)),
                        _signed(median(errors)),
                        _share(median(map(abs, errors))),
                        *(f"{count} of {len(errors)}" for count in within),
                    ]
                )
    return table(
        ["group", "memory", "rows", "median, signed", "median, absolute", "within 5 %", "within 10 %"],
        lines,
        numbers=(2, 3, 4, 5, 6),
    )


def _order_table(rows: Sequence[Predicted]) -> str:
    def count(key: tuple[str, int, int, int]) -> int:
        return sum((row.group, row.hidden, row.layers, row.gpus) == key for row in rows)

    lines = [
        [key[0], f"{key[1]} wide, {key[2]} layers", str(key[3]), str(count(key)), f"{tau:.2f}"]
        for key, tau in sorted(taus(rows).items())
    ]
    return table(["group", "model", "GPUs", "rows", "Kendall's tau"], lines, numbers=(2, 3, 4))


def axes_table(rows: Sequence[Predicted]) -> str:
    """Errors of the rows over context ranks, experts and stages, by group."""
    lines = []
    for title, axis in (("cp > 1", "cp"), ("ep > 1", "ep"), ("pp > 1", "pp")):
        for name, group in groups_of(row for row in rows if getattr(row, axis) > 1).items():
            errors = [row.error for row in group]
            absolute = [abs(error) for error in errors]
            share = [_share(median(absolute)), _share(quantile(absolute, 0.9))]
            lines.append([title, name, str(len(group)), _signed(median(errors)), *share])
    head = ["rows", "group", "number", "median, signed", "median, absolute", "90 % within"]
    return table(head, lines, numbers=(2, 3, 4, 5))


def experts_table(rows: Sequence[Predicted]) -> str:
    """Every row of a mixture of experts."""
    lines = []
    for row in sorted((row for row in rows if row.ep > 1), key=lambda row: (row.group, row.model, row.gpu)):
        memory = "" if row.memory_error is None else _signed(row.memory_error)
        degrees = f"{row.pp}/{row.dp}/{row.ep}"
        times = [f"{row.measured_s:.3g} s", f"{row.predicted_s:.3g} s", _signed(row.error), memory]
        lines.append([row.group, row.model, row.gpu, str(row.gpus), degrees, *times, why(row)])
    head = ["group", "model", "GPU", "GPUs", "pp/dp/ep", "measured", "predicted", "error", "memory", "why"]
    return table(head, lines, numbers=(3, 5, 6, 7, 8))


def not_taken_table(run: Published) -> str:
    lines = [[each.group, each.model, each.over, str(each.rows), each.reason] for each in run.not_taken]
    return table(["group", "model", "over", "rows", "why it isn't predicted"], lines, numbers=(3,))


def plot(run: Published) -> str:
    """Predicted against measured, both logarithmic, as SVG: a dot a row, and the band of 10 % around
    equality."""
    size, edge = 640, 60
    low, high = -1.5, 2.5  # log10 of seconds
    colours = (
        "#3b6fb6",
        "#c7562c",
        "#3d8f5a",
        "#8d5ab5",
        "#b8902b",
        "#4aa3a8",
        "#b4467d",
        "#6b7280",
        "#1f4e79",
        "#a33b3b",
        "#5f7d2f",
    )

    def at(seconds: float) -> float:
        return edge + (log10(seconds) - low) / (high - low) * (size - 2 * edge)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 190} {size}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{size + 190}" height="{size}" fill="#ffffff"/>',
    ]
    for factor, dash in ((1.0, ""), (1.1, "4 4"), (1 / 1.1, "4 4")):
        ends = [(10**low, 10**low * factor), (10**high, 10**high * factor)]
        (x0, y0), (x1, y1) = ((at(x), size - at(y)) for x, y in ends)
        parts.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#9aa1ab" '
            f'stroke-dasharray="{dash}"/>'
        )
    for power in (-1, 0, 1, 2):
        place = at(10.0**power)
        label = f"{10.0**power:g} s"
        parts.append(
            f'<text x="{place:.1f}" y="{size - edge + 24}" text-anchor="middle" fill="#444b55">{label}</text>'
        )
        parts.append(
            f'<text x="{edge - 10}" y="{size - place + 4:.1f}" text-anchor="end" '
            f'fill="#444b55">{label}</text>'
        )
        parts.append(
            f'<line x1="{place:.1f}" y1="{edge}" x2="{place:.1f}" y2="{size - edge}" stroke="#eceef1"/>'
        )
        parts.append(
            f'<line x1="{edge}" y1="{size - place:.1f}" x2="{size - edge}" y2="{size - place:.1f}" '
            'stroke="#eceef1"/>'
        )
    rows = with_tensor_parallel(run)
    for number, (name, group) in enumerate(groups_of(rows).items()):
        colour = colours[number % len(colours)]
        for row in group:
            parts.append(
                f'<circle cx="{at(row.measured_s):.1f}" cy="{size - at(row.predicted_s):.1f}" r="3" '
                f'fill="{colour}" fill-opacity="0.55"/>'
            )
        parts.append(f'<circle cx="{size - 30}" cy="{edge + 22 * number}" r="5" fill="{colour}"/>')
        parts.append(
            f'<text x="{size - 18}" y="{edge + 22 * number + 4}" fill="#1f242b">{name} ({len(group)})</text>'
        )
    parts.append(
        f'<text x="{size / 2}" y="{size - 12}" text-anchor="middle" fill="#1f242b">measured step</text>'
    )
    parts.append(
        f'<text x="16" y="{size / 2}" text-anchor="middle" fill="#1f242b" transform="rotate(-90 16 '
        f'{size / 2})">predicted step</text>'
    )
    parts.append(
        f'<text x="{edge}" y="30" fill="#1f242b">{len(rows)} published runs with TP &gt; 1; dashed: 10 % '
        "off</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def _signed(value: float) -> str:
    return f"{value:+.1%}".replace("%", " %")
