"""Explained -> rich renderables: step after step, ranks side by side where they fit, with or without colour.
Computes nothing.

Colours are the owners'. Without colour it reads too: a dot stands for a zero that is there because another
rank owns the row.
"""

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from shardwise.core.walkthrough import Content, Phase, Role, Row
from shardwise.report.common.plain import plain
from shardwise.walkthrough.words import Explained, ExplainedMatrix, ExplainedPanel, ExplainedStep, Summary

RANK_COLORS = ("dodger_blue1", "dark_orange", "green3", "medium_orchid")
EMPTY = "·"


def render_walkthrough(explained: Explained, console: Console) -> None:
    """Prints all steps for the console's width."""
    for renderable in walkthrough_renderables(explained, console.width):
        console.print(renderable)


def walkthrough_renderables(explained: Explained, width: int) -> list[RenderableType]:
    """Title, steps and summary, laid out for `width` columns."""
    parts: list[RenderableType] = [
        Padding(Group(Text(explained.title, "bold"), Text(plain(explained.lead), "dim")), (0, 1))
    ]
    count = len(explained.steps) + 1
    for number, step in enumerate(explained.steps, start=1):
        parts += _step(step, number, count, width)
    parts += _summary(explained.summary, count)
    return parts


def format_value(value: float | None) -> str:
    """A number of a matrix, short enough to stand among others: whole ones as they are, others to two or
    three decimals; a dash for none."""
    if value is None:
        return "–"
    if value == round(value):
        return f"{round(value)}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _step(step: ExplainedStep, number: int, count: int, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_heading(f"{number}/{count}", step.phase, step.title), _words(step.words)]
    ranks = [panel for panel in step.panels if panel.rank is not None]
    parts.append(_side_by_side([(panel, panel.holds) for panel in ranks], width))
    if step.wire:
        parts.append(_wire(step))
    if any(panel.gets for panel in ranks):
        parts.append(_side_by_side([(panel, panel.gets) for panel in ranks], width))
    whole = [(panel, panel.holds) for panel in step.panels if panel.rank is None]
    if whole:
        parts.append(_side_by_side(whole, width))
    if step.agreement:
        parts.append(Padding(Text(step.agreement, "green" if step.agrees else "bold red"), (0, 1)))
    parts.append(Text(""))
    return parts


def _heading(number: str, phase: Phase | None, title: str) -> RenderableType:
    text = Text.assemble(
        (f"{number} ", "dim"), (f"{phase} " if phase else "", "italic cyan"), (title, "bold")
    )
    return Rule(text, align="left", style="dim", characters="─")


def _words(words: str) -> RenderableType:
    return Padding(Text(plain(words)), (0, 1))


def _wire(step: ExplainedStep) -> RenderableType:
    lines = [Text(step.wire, "bold")]
    for explained in step.transfers:
        transfer = explained.transfer
        lines.append(
            Text.assemble(
                (f"rank {transfer.source}", RANK_COLORS[transfer.source % len(RANK_COLORS)]),
                " ──▶ ",
                (f"rank {transfer.destination}", RANK_COLORS[transfer.destination % len(RANK_COLORS)]),
                f"  {explained.text}",
            )
        )
    return Padding(Group(*lines), (0, 3))


def _side_by_side(
    panels: list[tuple[ExplainedPanel, tuple[ExplainedMatrix, ...]]], width: int
) -> RenderableType:
    drawn = [_panel(panel, matrices) for panel, matrices in panels if matrices]
    return Columns(
        drawn, padding=(0, 1), width=max(_width(matrices) for _, matrices in panels) if drawn else width
    )


def _width(matrices: tuple[ExplainedMatrix, ...]) -> int:
    """Columns that a panel needs: labels, cells, a space beside each, borders."""
    return max(
        (
            max(len(matrix.caption), _label_width(matrix) + sum(_cell_widths(matrix))) + 5
            for matrix in matrices
        ),
        default=20,
    )


def _label_width(matrix: ExplainedMatrix) -> int:
    return max(map(len, matrix.row_labels), default=0)


def _cell_widths(matrix: ExplainedMatrix) -> list[int]:
    rows = [[len(format_value(value)) for value in row.values] for row in matrix.matrix.rows]
    labels = [len(label) for label in matrix.column_labels] or [0] * (len(rows[0]) if rows else 0)
    return [
        max(label, *(row[index] for row in rows)) + 1 if rows else label + 1
        for index, label in enumerate(labels)
    ]


def _panel(panel: ExplainedPanel, matrices: tuple[ExplainedMatrix, ...]) -> Panel:
    color = "white" if panel.rank is None else RANK_COLORS[panel.rank % len(RANK_COLORS)]
    return Panel(
        Group(*(_matrix(matrix) for matrix in matrices)),
        title=Text(panel.title, f"bold {color}"),
        title_align="left",
        border_style=color,
        box=box.ROUNDED,
        padding=(0, 1),
    )


def _matrix(explained: ExplainedMatrix) -> RenderableType:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_header=any(explained.column_labels),
        header_style="dim",
    )
    table.add_column("", no_wrap=True)
    for label in explained.column_labels or [""] * (
        len(explained.matrix.rows[0].values) if explained.matrix.rows else 0
    ):
        table.add_column(Text(label), justify="right", no_wrap=True)
    for label, row in zip(explained.row_labels, explained.matrix.rows, strict=True):
        cells = [
            Text(_cell(value, row, explained), _style(row, index, explained))
            for index, value in enumerate(row.values)
        ]
        table.add_row(Text(label, "dim" if row.role is Role.ZERO else _style(row, 0, explained)), *cells)
    if not explained.matrix.rows:
        table.add_row(Text("nothing", "dim"))
    return Group(Text(explained.caption, "underline"), table)


def _cell(value: float | None, row: Row, explained: ExplainedMatrix) -> str:
    is_mask = explained.matrix.content is Content.LOCAL_ROWS
    return EMPTY if row.role is Role.ZERO and value == 0 and not is_mask else format_value(value)


def _style(row: Row, index: int, explained: ExplainedMatrix) -> str:
    if row.role in (Role.ZERO, Role.UNTOUCHED, Role.IGNORED):
        return "dim"
    owners = explained.matrix.column_owners
    owner = owners[index] if owners else row.owner
    color = "" if owner is None else RANK_COLORS[owner % len(RANK_COLORS)]
    return f"bold {color}".strip() if row.role is Role.SUMMED else color


def _summary(summary: Summary, count: int) -> list[RenderableType]:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for column in summary.columns:
        table.add_column(column, overflow="fold")
    for index, row in enumerate(summary.rows):
        table.add_row(*(Text(cell) for cell in row), style="dim" if index == len(summary.rows) - 1 else "")
    return [_heading(f"{count}/{count}", None, summary.title), _words(summary.words), Padding(table, (0, 1))]
