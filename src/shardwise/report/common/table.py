"""What a verb tells, as data: tables, and words around them. A format draws them; nothing here knows how.

A cell holds a value (SI units: bytes, seconds) and a column says how it reads, so that a page can sort and a
CSV file keeps all digits. Texts may come from a user's files: whoever draws them shows control characters as
escapes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from shardwise.report.common.units import BAR, TEXT, Format

_Item = TypeVar("_Item")
Value = str | int | float | None
ABSENT = "–"
"""Of a number that others in the column have: a cell has no room for "not measured"."""


class Tone(StrEnum):
    """How a text is meant. Never all that tells it: without colour the words must do."""

    PLAIN = "plain"
    STRONG = "strong"
    GOOD = "good"
    BAD = "bad"
    CAUTION = "caution"
    QUIET = "quiet"
    HEADING = "heading"


class RowKind(StrEnum):
    """heading: a title over the rows below it; total: a sum, apart from the others; repeat: the first once
    more (A/A); rest: what stands for rows that are left out."""

    BODY = "body"
    HEADING = "heading"
    TOTAL = "total"
    REPEAT = "repeat"
    REST = "rest"


@dataclass(frozen=True, slots=True)
class Column:
    """name: as its head reads. wraps: its texts may run over several lines. spills: where there is no room
    for all columns, it goes to a line under the row. sums: its values add up. of: whose numbers these are,
    where the column before it says so already: a file names it. A column of numbers stands at the right."""

    name: str
    format: Format = TEXT
    wraps: bool = False
    spills: bool = False
    sums: bool = False
    of: str = ""

    @property
    def is_number(self) -> bool:
        return self.format is not TEXT and self.format is not BAR


@dataclass(frozen=True, slots=True)
class Cell:
    """A value and, where the column's format doesn't say it, how it reads. about: quiet, under it.

    On a page: mark is the class of a coloured dot before it, badge that of a frame around it, href what it
    links to, place what it sorts by where that isn't the value.
    """

    value: Value = None
    text: str | None = None
    tone: Tone = Tone.PLAIN
    about: str = ""
    mark: str = ""
    badge: str = ""
    href: str = ""
    place: int | None = None

    def read(self, column: Column) -> str:
        if self.text is None and isinstance(self.value, str):
            return self.value
        return self.text if self.text is not None else column.format.text(self.value)


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence or two. lead: who or what it is about, before it and stronger."""

    text: str
    tone: Tone = Tone.PLAIN
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """below: lines under the row, over the table's whole width."""

    cells: tuple[Cell, ...]
    kind: RowKind = RowKind.BODY
    below: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """key: its name in file names and pages. sorts: whether a reader may want other orders than this one.
    headed: whether a reader needs the columns' names. short, long: how many rows a terminal and a page show;
    a CSV file has all."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[Line, ...] = ()
    sorts: bool = False
    headed: bool = True
    short: int | None = None
    long: int | None = None

    def cut(self, most: int | None) -> "Table":
        """What a reader sees: no column in which all cells are empty, and of the rows `most`, with one for
        the others: how many, and what adds up."""
        empty = {
            index
            for index in range(1, len(self.columns))
            if all(_is_empty(each, index) for each in self.rows)
        }
        table = self._without(empty) if self.rows else self
        return table._with(most)

    def without_bars(self) -> "Table":
        """For whom a bar of characters is none."""
        return self._without({index for index, column in enumerate(self.columns) if column.format is BAR})

    def _without(self, empty: set[int]) -> "Table":
        columns = tuple(column for index, column in enumerate(self.columns) if index not in empty)
        rows = tuple(
            replace(each, cells=tuple(cell for index, cell in enumerate(each.cells) if index not in empty))
            for each in self.rows
        )
        return replace(self, columns=columns, rows=rows)

    def _with(self, most: int | None) -> "Table":
        body = [each for each in self.rows if each.kind in (RowKind.BODY, RowKind.REPEAT)]
        if most is None or len(body) <= most:
            return self
        left_out = body[most:]
        gone = {id(each) for each in left_out}  # rows may be many, and equal
        kept = tuple(each for each in self.rows if id(each) not in gone)
        first = next(index for index, column in enumerate(self.columns) if not column.is_number)
        cells = tuple(
            Cell(_sum(each.cells[index].value for each in left_out), tone=Tone.QUIET)
            if column.sums
            else Cell(f"{len(left_out)} more" if index == first else None, text=None, tone=Tone.QUIET)
            for index, column in enumerate(self.columns)
        )
        return replace(self, rows=(*kept, Row(cells, RowKind.REST)))


@dataclass(frozen=True, slots=True)
class Words:
    """Lines that stand together. boxed: the answer, which a reader must not miss; items: each line is one of
    a list."""

    lines: tuple[Line, ...]
    title: str = ""
    tone: Tone = Tone.PLAIN
    boxed: bool = False
    items: bool = False


Block = Table | Words


@dataclass(frozen=True, slots=True)
class Report:
    """All that a verb tells, in the order in which one reads it. appendix: tables for which only a page and
    files have room."""

    title: str
    blocks: tuple[Block, ...]
    appendix: tuple[Table, ...] = ()

    def tables(self) -> Iterator[Table]:
        yield from (block for block in self.blocks if isinstance(block, Table))
        yield from self.appendix


def row(*cells: Cell | Value, kind: RowKind = RowKind.BODY, below: tuple[Line, ...] = ()) -> Row:
    """A row of values and cells."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), kind, below)


Made = Callable[[_Item], Cell | Value]
Columns = Sequence[tuple[Column, Made[_Item]]]


def tabled(
    items: Iterable[_Item],
    columns: Columns[_Item],
    *totals: Row,
    below: Callable[[_Item], Iterable[Line]] = lambda _: (),
    kind: Callable[[_Item], RowKind] = lambda _: RowKind.BODY,
    key: str,
    title: str = "",
    notes: Iterable[Line] = (),
    sorts: bool = False,
    short: int | None = None,
    long: int | None = None,
) -> Table:
    """A table of a row per item: each column beside what it holds of an item. totals: rows after them."""
    body = [
        row(*(made(item) for _, made in columns), kind=kind(item), below=tuple(below(item))) for item in items
    ]
    heads = tuple(column for column, _ in columns)
    return Table(key, title, heads, (*body, *totals), tuple(notes), sorts, short=short, long=long)


def heading(title: str) -> Row:
    """A title over the rows below it."""
    return Row((Cell(title),), RowKind.HEADING)


def _is_empty(line: Row, index: int) -> bool:
    """An absent value, or a dash for it."""
    if line.kind is RowKind.HEADING:
        return True
    cell = line.cells[index]
    return cell.value in (None, "") and cell.text in (None, "", ABSENT)


def _sum(values: Iterable[Value]) -> float:
    return sum(value for value in values if isinstance(value, int | float))
