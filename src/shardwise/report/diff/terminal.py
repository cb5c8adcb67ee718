"""One profiled run, or two side by side -> tables for a terminal. Names come from files: they are text, never markup."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shardwise.core.difference import Difference, RunProfile
from shardwise.report.common.plain import plain
from shardwise.report.diff import rows

_LINES = 16
_CPU_LINES = 8
_COLLECTIVES = 8


def render_run(run: RunProfile, words: Sequence[str], console: Console) -> None:
    """One run by itself."""
    console.print(Text.assemble((plain(run.label), "bold"), f": {plain(rows.about(run))}"), soft_wrap=True)
    _verdict(words, console)
    _parts([run], console)
    _collectives([run], console)
    _work(run, console)
    _cpu([run], console)
    _cautions([run], console)


def render_difference(difference: Difference, console: Console) -> None:
    """second against first."""
    runs = [difference.first, difference.second]
    for run in runs:
        console.print(
            Text.assemble((plain(run.label), "bold"), f": {plain(rows.about(run))}"), soft_wrap=True
        )
    _verdict(difference.verdict, console)
    _parts(runs, console)
    _lines(difference, console)
    _books(difference, console)
    _collectives(runs, console)
    _copies(difference, console)
    _cpu(runs, console)
    _cpu_lines(difference, console)
    _cautions(runs, console)


def _table(title: str, *columns: tuple[str, str], fold: str = "") -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right" and name != fold)  # type: ignore[arg-type]
    return table


def _verdict(words: Sequence[str], console: Console) -> None:
    if words:
        text = Text("\n").join(Text(plain(line)) for line in words)
        console.print(Panel(text, box=box.ROUNDED, title="In words", title_align="left"))


def _parts(runs: Sequence[RunProfile], console: Console) -> None:
    names = [plain(run.label) for run in runs]
    columns = [("Part of a step", "left")] + [
        column for name in names for column in ((name, "right"), ("", "right"))
    ]
    both = len(runs) == 2
    table = _table("A step of one rank, on average", *columns, *((("change", "right"),) if both else ()))
    for row in rows.part_rows(runs):
        cells = [
            cell
            for ns, share in zip(row.ns, row.share, strict=True)
            for cell in (rows.time(ns), f"{100 * share:.1f} %")
        ]
        table.add_row(row.label, *cells, *((rows.signed(row.delta_ns),) if both else ()))
    table.add_section()
    totals = [cell for run in runs for cell in (rows.time(run.step_ns), "")]
    table.add_row(
        "step", *totals, *((rows.signed(runs[1].step_ns - runs[0].step_ns),) if both else ()), style="bold"
    )
    hidden = [cell for run in runs for cell in (rows.time(run.communication_ns), _hidden(run))]
    table.add_row(
        "all communication",
        *hidden,
        *((rows.signed(runs[1].communication_ns - runs[0].communication_ns),) if both else ()),
    )
    console.print(table)


def _hidden(run: RunProfile) -> str:
    share = run.overlap_share
    return "" if share is None else f"{100 * share:.1f} % hidden"


def _lines(difference: Difference, console: Console) -> None:
    table = _table(
        f"What changed most, of {len(difference.lines)} lines",
        ("Work", "left"), ("calls", "right"), ("time", "right"), ("calls", "right"), ("time", "right"), ("change", "right"), ("matched by", "left"),
    )  # fmt: skip
    for line in difference.lines[:_LINES]:
        table.add_row(
            Text.assemble(plain(rows.what(line)), *((("\n" + plain(rows.shapes(line)), "dim"),) if rows.shapes(line) else ())),
            rows.calls(line.first), rows.time(line.first.ns), rows.calls(line.second), rows.time(line.second.ns),
            rows.signed(line.delta_ns), str(line.matched),
        )  # fmt: skip
    rest = difference.lines[_LINES:]
    if rest:
        table.add_row(
            f"{len(rest)} more",
            "",
            "",
            "",
            "",
            rows.signed(sum(line.delta_ns for line in rest)),
            "",
            style="dim",
        )
    console.print(table)


def _books(difference: Difference, console: Console) -> None:
    names = (plain(difference.first.label), plain(difference.second.label))
    table = _table(
        "How it adds up", ("", "left"), (names[0], "right"), (names[1], "right"), ("change", "right")
    )
    for label, first, second in rows.books(difference):
        table.add_row(label, rows.time(first), rows.time(second), rows.signed(second - first))
    console.print(table)


def _collectives(runs: Sequence[RunProfile], console: Console) -> None:
    for run in runs:
        if not run.collectives:
            continue
        table = _table(
            f"Collectives of {plain(run.label)}, per step of one rank" if len(runs) > 1 else "Collectives, per step of one rank",
            ("Collective, and who was waited for", "left"), ("calls", "right"), ("in it", "right"), ("before the last came", "right"),
            ("transfer", "right"), ("bus", "right"),
        )  # fmt: skip
        for use in run.collectives[:_COLLECTIVES]:
            asked = f" of {plain(use.origin)}" if use.origin else ""
            waited = rows.late(use)
            table.add_row(
                Text.assemble(f"{rows.collective_name(plain(use.op))}{asked}", *(((f"\n{plain(waited)}", "dim"),) if waited else ())),
                rows.calls(use.use), rows.time(use.use.ns), rows.time(use.waiting_ns),
                ("≥ " if use.is_bound and use.transfer_ns is not None else "") + rows.time(use.transfer_ns), rows.speed(use),
            )  # fmt: skip
        rest = run.collectives[_COLLECTIVES:]
        if rest:
            table.add_row(
                f"{len(rest)} more", "", rows.time(sum(use.use.ns for use in rest)), "", "", "", style="dim"
            )
        console.print(table)


def _work(run: RunProfile, console: Console) -> None:
    table = _table(
        "Where the time goes",
        ("Work", "left"),
        ("calls", "right"),
        ("time", "right"),
        ("of the step", "right"),
    )
    for work, use in run.work[:_LINES]:
        table.add_row(
            plain(rows.work_name(work)),
            rows.calls(use),
            rows.time(use.ns),
            f"{100 * use.ns / run.step_ns:.1f} %",
        )
    console.print(table)


def _copies(difference: Difference, console: Console) -> None:
    if not difference.copies:
        return
    table = _table(
        "Copies that one makes more often",
        ("Copy", "left"),
        ("calls", "right"),
        ("time", "right"),
        ("calls", "right"),
        ("time", "right"),
    )
    for line in difference.copies[:_CPU_LINES]:
        table.add_row(
            plain(rows.what(line)),
            rows.calls(line.first),
            rows.time(line.first.ns),
            rows.calls(line.second),
            rows.time(line.second.ns),
        )
    console.print(table)


def _cpu(runs: Sequence[RunProfile], console: Console) -> None:
    table = _table(
        "The CPU, per step of one rank",
        ("Run", "left"), ("ops", "right"), ("time in them", "right"), ("launches", "right"), ("time in them", "right"),
    )  # fmt: skip
    for run in runs:
        ops, launches = run.cpu.ops, run.cpu.launches
        table.add_row(
            plain(run.label), rows.calls(ops), rows.time(ops.ns), rows.calls(launches), rows.time(launches.ns)
        )
    console.print(table)


def _cpu_lines(difference: Difference, console: Console) -> None:
    lines = [line for line in difference.cpu_lines if line[1].ns != line[2].ns][:_CPU_LINES]
    if not lines:
        return
    table = _table(
        "CPU ops that changed most (without the ops inside them)",
        ("Op", "left"), ("calls", "right"), ("time", "right"), ("calls", "right"), ("time", "right"), ("change", "right"),
    )  # fmt: skip
    for name, first, second in lines:
        table.add_row(
            plain(rows.shortened(name, 60)), rows.calls(first), rows.time(first.ns), rows.calls(second), rows.time(second.ns),
            rows.signed(second.ns - first.ns),
        )  # fmt: skip
    console.print(table)


def _cautions(runs: Sequence[RunProfile], console: Console) -> None:
    for run in runs:
        for line in rows.cautions(run):
            console.print(Padding(Text(f"{plain(run.label)}: {plain(line)}.", style="yellow"), (0, 1)))
