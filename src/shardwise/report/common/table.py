"""What a verb tells, as data: tables, and words around them. A format draws them; nothing here knows how.

A cell holds a value (SI units: bytes, seconds) and a column says how it reads, so that a page can sort and a CSV file keeps all digits.
Texts may come from a user's files: whoever draws them shows control characters as escapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from shardwise.report.common.units import TEXT, Format

Value = str | int | float | None


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
    """heading: a title over the rows below it; total: a sum, apart from the others; repeat: the first once more (A/A)."""

    BODY = "body"
    HEADING = "heading"
    TOTAL = "total"
    REPEAT = "repeat"


@dataclass(frozen=True, slots=True)
class Column:
    """name: as its head reads. wraps: its texts may run over several lines. spills: where there is no room for all columns, it goes to a
    line under the row. A column of numbers stands at the right."""

    name: str
    format: Format = TEXT
    wraps: bool = False
    spills: bool = False

    @property
    def is_number(self) -> bool:
        return self.format is not TEXT


@dataclass(frozen=True, slots=True)
class Cell:
    """A value and, where the column's format doesn't say it, how it reads. about: quiet, under it.

    On a page: mark is the class of a coloured dot before it, badge that of a frame around it, href what it links to.
    """

    value: Value = None
    text: str | None = None
    tone: Tone = Tone.PLAIN
    about: str = ""
    mark: str = ""
    badge: str = ""
    href: str = ""

    def read(self, column: Column) -> str:
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
    """key: its name in file names and pages. sorts: whether a reader may want other orders than this one. headed: whether a reader needs the
    columns' names."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[Line, ...] = ()
    sorts: bool = False
    headed: bool = True


@dataclass(frozen=True, slots=True)
class Words:
    """Lines that stand together. boxed: the answer, which a reader must not miss; items: each line is one of a list."""

    lines: tuple[Line, ...]
    title: str = ""
    tone: Tone = Tone.PLAIN
    boxed: bool = False
    items: bool = False


Block = Table | Words


@dataclass(frozen=True, slots=True)
class Report:
    """All that a verb tells, in the order in which one reads it."""

    title: str
    blocks: tuple[Block, ...]

    def tables(self) -> Iterator[Table]:
        return (block for block in self.blocks if isinstance(block, Table))


def row(*cells: Cell | Value, kind: RowKind = RowKind.BODY, below: tuple[Line, ...] = ()) -> Row:
    """A row of values and cells."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), kind, below)


def heading(title: str) -> Row:
    """A title over the rows below it."""
    return Row((Cell(title),), RowKind.HEADING)
