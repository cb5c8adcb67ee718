"""Sweep -> rich renderables: the best points in a table, what was left out and why. Computes nothing."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shardwise.core.sweep import Sweep
from shardwise.report.common.plain import name, plain, sentence
from shardwise.report.common.units import format_bytes, format_count, format_seconds
from shardwise.report.predict import rows as predict_rows
from shardwise.report.predict import sweep_rows as rows


def render_sweep(sweep: Sweep, console: Console, top: int) -> None:
    """Prints the sweep: at most `top` rows."""
    title = Text.assemble(
        (plain(name(sweep.model)), "bold"), " on ", (plain(name(sweep.machine.name)), "bold")
    )
    console.print(Padding(title, (0, 1)))
    console.print(Padding(Text(plain(rows.setting_text(sweep))), (0, 1)))
    console.print(Padding(Text(plain(rows.headline(sweep)), "bold"), (1, 1)))
    if sweep.points:
        console.print(_table(sweep, top))
        legend = "batch: sequences of a data-parallel rank at a time x times a step; tokens/s and memory: of one device."
        console.print(Padding(Text(legend, "dim"), (0, 1)))
    if len(sweep.points) > top:
        console.print(
            Padding(
                Text(f"{len(sweep.points) - top:,} more; --top shows more, --json and --out all.", "dim"),
                (0, 1),
            )
        )
    for refusal in sweep.refused[: rows.REFUSALS]:
        said = f"{refusal.points:,} left out under {plain(name(refusal.plan))}: {plain(sentence(refusal.reason))}"
        console.print(Padding(Text(said, "yellow"), (0, 1)))
    if len(sweep.refused) > rows.REFUSALS:
        console.print(
            Padding(
                Text(
                    f"{len(sweep.refused) - rows.REFUSALS} reasons more are in the JSON and on the page.",
                    "yellow",
                ),
                (0, 1),
            )
        )
    lines = [f"- {plain(line)}" for line in rows.assumptions(sweep)]
    lines += [plain(rows.traced_text(sweep)), f"Machine: {plain(predict_rows.machine_text(sweep.machine))}."]
    console.print(Panel(Text("\n".join(lines)), box=box.ROUNDED, title="Assumed", title_align="left"))


def _table(sweep: Sweep, top: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    has_plans = rows.has_plans(sweep)
    columns = [("plan", "left")] if has_plans else []
    columns += [
        ("mesh", "left"), ("batch", "right"), ("step", "right"), ("tokens/s", "right"), ("memory", "right"), ("lost to", "left"),
    ]  # fmt: skip
    for label, justify in columns:
        table.add_column(label, justify=justify, no_wrap=label != "plan", overflow="fold")  # type: ignore[arg-type]
    for point in sweep.points[:top]:
        cells = [plain(name(point.plan, "(no plan)"))] if has_plans else []
        cells += [
            rows.mesh_text(point), rows.micro_text(point), format_seconds(point.step_s),
            format_count(point.tokens_per_s_per_device), format_bytes(point.memory.device_bytes),
            rows.lost_text(point) if point.fits else "doesn't fit",
        ]  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells), style="" if point.fits else "red")
    return table
