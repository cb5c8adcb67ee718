"""The report for a terminal of a given width, with or without colour. Names are shown as text, never read as
rich's markup."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from shardwise.report.common.layout import GAP, Part, fitted, fitted_head, lay_out, wrap
from shardwise.report.common.plain import plain
from shardwise.report.common.room import Room
from shardwise.report.common.table import Block, Cell, Column, Line, Row, RowKind, Table, Tone, Words

_STYLES = {
    Tone.PLAIN: "",
    Tone.STRONG: "bold",
    Tone.GOOD: "green",
    Tone.BAD: "bold red",
    Tone.CAUTION: "yellow",
    Tone.QUIET: "dim",
    Tone.HEADING: "bold cyan",
}
_KINDS = {
    RowKind.TOTAL: "bold",
    RowKind.REPEAT: "dim",
    RowKind.HEADING: "bold cyan",
    RowKind.REST: "dim",
    RowKind.BODY: "",
}
_INDENT = 2


def files(room: Room, result: object, **page: object) -> dict[str, bytes]:
    """A run folder has none: a terminal's width is its own."""
    return {}


def show(room: Room, result: object, console: Console, most: int | None = None) -> None:
    """most: rows of tables that show the largest of many; by default each table's own number."""
    for index, block in enumerate(room.report(result).blocks):
        if index:
            console.print()
        console.print(drawn(block, console.width, most))


def drawn(block: Block, width: int, most: int | None = None) -> RenderableType:
    """A block for `width` columns."""
    if isinstance(block, Words):
        return Group(*_words(block, width))
    return Group(*_table(block.cut(block.short and (most or block.short)), width))


def _words(words: Words, width: int) -> Iterator[RenderableType]:
    style = _STYLES[words.tone]
    if words.boxed:
        lines = [_sentence(line, width - 4, "- " if words.items else "") for line in words.lines]
        *above, title = wrap(plain(words.title), width - 6)
        yield from (Text(line, f"bold {style}") for line in above)
        shown = Text(title, f"bold {style}") if title else None
        yield Panel(Group(*lines), box=box.ROUNDED, title=shown, title_align="left", border_style=style)
        return
    if words.title:
        yield _title(words.title, width)
    for line in words.lines:
        yield _sentence(line, width, "- " if words.items else "")


def _title(title: str, width: int) -> RenderableType:
    """Over several lines where it is long: the line is drawn behind the last."""
    *above, last = wrap(plain(title), width - 4)
    rule = Rule(Text(last, "bold"), align="left", style="dim", characters="─")
    return Group(*(Text(line, "bold") for line in above), rule)


def _sentence(line: Line, width: int, mark: str = "", style: str = "") -> RenderableType:
    """A lead, where there is one, is told apart by a colon too."""
    lead = f"{plain(line.lead)} " if line.lead else ""
    whole = f"{lead}{plain(line.text)}"
    text = Text("\n".join(wrap(whole, max(20, width - len(mark)))), style or _STYLES[line.tone])
    text.stylize("bold", 0, len(lead))
    if not mark:
        return text
    lines = text.split("\n", allow_blank=True)
    return Text("\n").join(
        Text(mark if not index else " " * len(mark)) + each for index, each in enumerate(lines)
    )


def _table(table: Table, width: int) -> Iterator[RenderableType]:
    if table.title:
        yield _title(table.title, width)
    texts = [
        [plain(column.name) for column in table.columns],
        *(_texts(row, table.columns) for row in table.rows),
    ]
    for index, part in enumerate(lay_out(table, texts, width)):
        if index:
            yield Text()
        yield Text("\n").join(_lines(table, texts, part, width))
    for note in table.notes:
        yield _sentence(note, width)


def _texts(row: Row, columns: Sequence[Column]) -> list[str]:
    return [_read(cell, column) for cell, column in zip(row.cells, columns, strict=False)]


def _read(cell: Cell, column: Column) -> str:
    return "\n".join(plain(text) for text in (cell.read(column), cell.about) if text)


def _lines(table: Table, texts: list[list[str]], part: Part, width: int) -> Iterator[Text]:
    whole = min(width, sum(part.widths) + GAP * (len(part.widths) - 1))
    if table.headed:
        yield from _cells(table, texts[0], part, [_STYLES[Tone.QUIET]] * len(part.columns), is_head=True)
        yield Text("─" * whole, "dim")
    before = RowKind.BODY
    for row, line in zip(table.rows, texts[1:], strict=True):
        if row.kind is RowKind.HEADING:
            yield from (Text(each, _KINDS[row.kind]) for each in wrap(line[0], width))
            continue
        if row.kind is RowKind.TOTAL and before is not RowKind.TOTAL:
            yield Text("─" * whole, "dim")
        before = row.kind
        styles = [_STYLES[row.cells[index].tone] or _KINDS[row.kind] for index in part.columns]
        yield from _cells(table, line, part, styles)
        if part.columns[-1] == len(table.columns) - 1 or part.spilled:
            yield from _below(table, row, line, part, width)


def _cells(
    table: Table, texts: Sequence[str], part: Part, styles: Sequence[str], *, is_head: bool = False
) -> Iterator[Text]:
    """The lines of one row: texts broken to their column's width, numbers at the right, heads at the
    bottom."""
    broken_in = fitted_head if is_head else fitted
    broken = [broken_in(texts[index], width) for index, width in zip(part.columns, part.widths, strict=True)]
    height = max(map(len, broken))
    for line in range(height):
        made = Text()
        for place, (index, width) in enumerate(zip(part.columns, part.widths, strict=True)):
            at = line - (height - len(broken[place])) if is_head else line
            text = broken[place][at] if 0 <= at < len(broken[place]) else ""
            space = " " * (width - cell_len(text))
            if table.columns[index].is_number:
                made.append(space)
                space = ""
            made.append(text, styles[place])
            made.append(space + " " * GAP * (place < len(part.columns) - 1))
        made.rstrip()
        yield made


def _below(table: Table, row: Row, texts: Sequence[str], part: Part, width: int) -> Iterator[Text]:
    """What spilled, and what is told of the row."""
    spilled = [_spilled(table.columns[index], texts[index]) for index in part.spilled if texts[index]]
    lines = [Line(" · ".join(spilled), Tone.QUIET), *row.below] if spilled else row.below
    for line in lines:
        text = _sentence(line, width - _INDENT)
        assert isinstance(text, Text)
        yield from (Text(" " * _INDENT) + each for each in text.split("\n"))


def _spilled(column: Column, text: str) -> str:
    told = ", ".join(text.split("\n"))
    return (
        f"{plain(column.name)}: {told}"
        if column.wraps and column.name
        else f"{plain(column.name)} {told}".strip()
    )
