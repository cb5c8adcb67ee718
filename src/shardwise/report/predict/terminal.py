"""PredictionRun -> rich renderables for a terminal of a given width, with or without colour. Computes nothing but the lengths of bars.

Names come from the user's files: they are shown as text, never read as markup, and control characters in them are made visible.
"""

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Prediction
from shardwise.core.prediction_run import PredictionRun
from shardwise.report.common.plain import name, plain
from shardwise.report.common.units import format_bytes, format_count, format_ratio, format_seconds
from shardwise.report.predict import rows

BAR = 24


def render_prediction(run: PredictionRun, console: Console) -> None:
    """Prints the run for the console's width."""
    for renderable in prediction_renderables(run):
        console.print(renderable)


def prediction_renderables(run: PredictionRun) -> list[RenderableType]:
    """Headline, terms, memory, what is flagged, what was assumed, and the machine."""
    parts = _one(run) if len(run.predictions) == 1 else _several(run)
    flagged = [
        Text(
            (f"{_plan(prediction)}: " if len(run.predictions) > 1 else "")
            + plain(rows.launch_text(prediction, stretches)),
            "yellow",
        )
        for prediction, stretches in zip(
            run.predictions, run.launch_bound or ((),) * len(run.predictions), strict=True
        )
        if rows.is_launch_bound(prediction)
    ]
    parts += [Padding(line, (0, 1)) for line in flagged]
    parts.append(_assumed(run))
    return parts


def _plan(prediction: Prediction) -> str:
    return plain(name(prediction.plan, "(no plan)"))


def _setting(run: PredictionRun) -> list[Text]:
    first = run.predictions[0]
    return [
        Text.assemble("mesh ", (plain(rows.mesh_text(first)), "bold")),
        Text(plain(rows.step_text(run.settings, first.setup))),
    ]


def _one(run: PredictionRun) -> list[RenderableType]:
    (prediction,) = run.predictions
    title = Text.assemble(
        (plain(name(prediction.model)), "bold"),
        " under plan ",
        (_plan(prediction), "bold"),
        " on ",
        (plain(name(run.machine.name)), "bold"),
    )
    said = Text(rows.headline(prediction), "bold" if prediction.memory.fits else "bold red")
    return [
        Padding(Group(title, *_setting(run), Text(""), said), (0, 1, 1, 1)),
        _terms(prediction),
        _memory(prediction),
    ]


def _terms(prediction: Prediction) -> Table:
    table = _table(
        "Where the step goes", ("term", "left"), ("time", "right"), ("share", "right"), ("", "left")
    )
    found = rows.term_rows([prediction])
    largest = max((row.shares[0] for row in found), default=0.0)
    for row in found:
        bar = Text(
            "█" * max(1, round(BAR * row.shares[0] / largest)) if row.seconds[0] > 0 and largest else "",
            "cyan",
        )
        time = "off" if row.is_off else format_seconds(row.seconds[0])
        table.add_row(str(row.term), time, "" if row.is_off else f"{100 * row.shares[0]:.1f} %", bar)
    table.add_section()
    table.add_row("step", format_seconds(prediction.step_s), "", "", style="bold")
    return table


def _memory(prediction: Prediction) -> Table:
    memory = prediction.memory
    table = _table("Memory of one rank at the peak", ("", "left"), ("bytes", "right"), ("", "left"))
    scale = max(memory.capacity_bytes, memory.device_bytes)
    for _, label, n_bytes in rows.memory_rows(memory):
        table.add_row(label, format_bytes(n_bytes), Text("█" * round(BAR * n_bytes / scale) or "▏", "cyan"))
    table.add_section()
    for label, n_bytes in rows.memory_levels(memory):
        table.add_row(label, format_bytes(n_bytes), Text("█" * round(BAR * n_bytes / scale), "dim"))
    table.add_row(Text(rows.fit_text(memory), "bold green" if memory.fits else "bold red"), "", "")
    return table


def _several(run: PredictionRun) -> list[RenderableType]:
    first = run.predictions[0]
    title = Text.assemble(
        (plain(name(first.model)), "bold"),
        " on ",
        (plain(name(run.machine.name)), "bold"),
        f": {len(run.predictions)} plans",
    )
    return [
        Padding(Group(title, *_setting(run)), (0, 1, 1, 1)),
        _plans(run),
        _terms_of_all(run.predictions),
        _memory_of_all(run.predictions),
    ]


def _plans(run: PredictionRun) -> Table:
    table = _table(
        "Per plan", ("plan", "left"), ("step", "right"), ("ratio", "right"), ("tokens/s each", "right"), ("memory", "right"),
        ("", "left"), ("most of the difference", "left"),
    )  # fmt: skip
    differences = (None, *run.differences)
    for prediction, difference in zip(run.predictions, differences, strict=True):
        fits = Text(
            "fits" if prediction.memory.fits else "doesn't fit",
            "green" if prediction.memory.fits else "bold red",
        )
        table.add_row(
            _plan(prediction),
            format_seconds(prediction.step_s),
            "1" if difference is None else format_ratio(difference.ratio),
            format_count(prediction.tokens_per_s_per_device),
            format_bytes(prediction.memory.device_bytes),
            fits,
            "" if difference is None else rows.difference_text(difference),
        )
    return table


def _terms_of_all(predictions: Sequence[Prediction]) -> Table:
    table = _table(
        "Where the step goes", ("term", "left"), *((_plan(prediction), "right") for prediction in predictions)
    )
    for row in rows.term_rows(predictions):
        table.add_row(
            str(row.term), *(("off",) * len(predictions) if row.is_off else map(format_seconds, row.seconds))
        )
    table.add_section()
    table.add_row("step", *(format_seconds(prediction.step_s) for prediction in predictions), style="bold")
    return table


def _memory_of_all(predictions: Sequence[Prediction]) -> Table:
    table = _table(
        "Memory of one rank at the peak",
        ("", "left"),
        *((_plan(prediction), "right") for prediction in predictions),
    )
    found = [
        {label: n_bytes for _, label, n_bytes in rows.memory_rows(prediction.memory)}
        for prediction in predictions
    ]
    for label in dict.fromkeys(label for each in found for label in each):
        table.add_row(label, *(format_bytes(each[label]) if label in each else "–" for each in found))
    table.add_section()
    for label, sizes in rows.levels_side_by_side(predictions):
        table.add_row(label, *map(format_bytes, sizes))
    return table


def _assumed(run: PredictionRun) -> RenderableType:
    first = run.predictions[0]
    lines = [
        *rows.assumptions(run.settings, first.setup, Mesh(first.axes)),
        *(f"{note}." for note in rows.notes(run)),
    ]
    text = Text("\n").join(
        [
            *(Text(f"- {plain(line)}") for line in lines),
            Text(f"Machine: {plain(rows.machine_text(run.machine))}."),
        ]
    )
    return Panel(text, box=box.ROUNDED, title="Assumed", title_align="left")


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    for label, justify in columns:
        table.add_column(Text(label), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table
