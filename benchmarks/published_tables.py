"""Predicted against published step times as sentences, tables and a plot."""

import csv
from collections.abc import Sequence
from math import log10
from pathlib import Path
from statistics import fmean, median

from benchmarks.hf_results import table
from benchmarks.published_results import (
    WHAT,
    Predicted,
    Published,
    group_median,
    groups_of,
    parts_of_groups,
    quantile,
    taus,
    with_tensor_parallel,
)

WORST = 12
PEERS = (
    Path(__file__).parent / "data" / "peers.csv"
)  # measured once for this project, with the tools as they come: no command here makes them
PLOT = Path(__file__).parent.parent / "docs" / "example" / "published.svg"


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
    for name, part, chosen in parts_of_groups(rows):
        errors = [row.error for row in chosen]
        absolute = [abs(error) for error in errors]
        lines.append(
            [
                name,
                part,
                ", ".join(sorted({row.gpu for row in chosen})),
                str(len(chosen)),
                _signed(median(errors)),
                _share(median(absolute)),
                _share(quantile(absolute, 0.9)),
                _share(median(abs(row.left_out_error) for row in chosen)),
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
