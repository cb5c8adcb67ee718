"""A Table laid out for so many columns of characters: which columns fit, how wide, and where texts break. No
label is lost, no word broken.

First every column is as wide as its longest text. Where that is too wide, columns that wrap do, at spaces,
and columns that spill go under their row, the last first; then what wraps gives way step by step; and at last
the table comes in parts, each with the first column.

A name that would take more than a few lines is shortened in its middle, where names that are alike differ
least: an ellipsis says so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from rich.cells import cell_len, chop_cells

from shardwise.report.common.table import Table
from shardwise.report.common.units import TEXT

GAP = 2
# a column of sentences is no narrower than this, or they would be a word a line
SENTENCE = 24
# what no reader takes for a word, such as a kernel's name or a hash, makes no column wider: breaks, or is
# shortened; where nothing else helps, already from so many characters on
LONGEST_WORD, LONGEST_AT_LAST = 40, 24
# what a head, and a name in a cell, takes at most
HEAD_LINES, NAME_LINES = 3, 5
ELLIPSIS = "…"

_SPACES = re.compile(r"\S+")
_PARTS = re.compile(r"[^\s./,=:|\-\[\]()]*[./,=:|\-\[\]()]+|[^\s./,=:|\-\[\]()]+")
_PIECES = re.compile(r"[^\s._/,=:|\-\[\]()]*[._/,=:|\-\[\]()]+|[^\s._/,=:|\-\[\]()]+")


@dataclass(frozen=True, slots=True)
class Part:
    """Columns that stand side by side (by index, with their widths), and those that are told under each
    row."""

    columns: tuple[int, ...]
    widths: tuple[int, ...]
    spilled: tuple[int, ...]


class Squeeze(IntEnum):
    """How far columns give way, each step with those before it: sentences may be a word a line; names break
    after a dot, a dash and the like; so do heads; and texts of columns that don't wrap."""

    NONE = 0
    SENTENCES = 1
    NAMES = 2
    HEADS = 3
    ALL = 4


def lay_out(table: Table, texts: Sequence[Sequence[str]], width: int) -> list[Part]:
    """texts: of the head and then of each row, a text per column (a heading has its title alone, and takes no
    column's room)."""
    columns = tuple(range(len(table.columns)))
    spilling = [index for index in columns if table.columns[index].spills]
    whole = [line for line in texts if len(line) == len(columns)]
    for squeeze in Squeeze:
        natural, least = _widths(table, whole, squeeze)
        for kept in range(len(spilling), -1, -1):
            spilled = tuple(spilling[kept:])
            side = tuple(index for index in columns if index not in spilled)
            if sum(least[index] for index in side) + GAP * (len(side) - 1) <= width:
                return [_part(side, natural, least, width, spilled)]
    return _parts(side, natural, least, width, spilled)


def _parts(
    side: tuple[int, ...], natural: list[int], least: list[int], width: int, spilled: tuple[int, ...]
) -> list[Part]:
    """The first column stands in each part."""
    first, *rest = side
    parts: list[Part] = []
    taken: list[int] = []
    for index in rest:
        if taken and sum(least[each] + GAP for each in (*taken, index)) + least[first] > width:
            parts.append(_part((first, *taken), natural, least, width, ()))
            taken = []
        taken.append(index)
    return [*parts, _part((first, *taken), natural, least, width, spilled)]


def _part(
    side: tuple[int, ...], natural: list[int], least: list[int], width: int, spilled: tuple[int, ...]
) -> Part:
    return Part(side, _share(side, natural, least, width), spilled)


def _widths(table: Table, texts: list[Sequence[str]], squeeze: Squeeze) -> tuple[list[int], list[int]]:
    """(as wide as the longest text, as narrow as it may be) of each column. A head always wraps."""
    natural, least = [], []
    for index, column in enumerate(table.columns):
        head, *cells = (line[index] for line in texts)
        longest = max((cell_len(line) for text in cells for line in text.split("\n")), default=0)
        narrowest = longest
        if column.wraps or (squeeze is Squeeze.ALL and column.format is TEXT):
            narrowest = max((_longest_word(text, squeeze, Squeeze.NAMES) for text in cells), default=0)
            if squeeze is Squeeze.NONE:
                narrowest = max(narrowest, min(longest, SENTENCE))
        narrowest = max(narrowest, _longest_word(head, squeeze, Squeeze.HEADS))
        natural.append(max(longest, narrowest, _width_of_head(head)))
        least.append(narrowest)
    return natural, least


def _width_of_head(head: str) -> int:
    """The least at which it takes no more than HEAD_LINES, which is worth having where there is room."""
    widths = range(1, cell_len(head) + 1)
    return next((width for width in widths if len(wrap(head, width)) <= HEAD_LINES), 0)


def _longest_word(text: str, squeeze: Squeeze, breaks_from: Squeeze) -> int:
    words = (_PIECES if squeeze >= breaks_from else _SPACES).findall(text)
    most = LONGEST_AT_LAST if squeeze is Squeeze.ALL else LONGEST_WORD
    return min(most, max((cell_len(word) for word in words), default=0))


def _share(side: tuple[int, ...], natural: list[int], least: list[int], width: int) -> tuple[int, ...]:
    """Each its least, and what is left to those that want more, the narrowest first."""
    widths = {index: least[index] for index in side}
    left = width - sum(widths.values()) - GAP * (len(side) - 1)
    wanting = sorted(
        (index for index in side if natural[index] > widths[index]), key=lambda each: natural[each]
    )
    for place, index in enumerate(wanting):
        more = min(natural[index] - widths[index], left // (len(wanting) - place))
        widths[index] += more
        left -= more
    return tuple(widths[index] for index in side)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`: broken at spaces, else after a dot, dash and the like. What is longer than
    that breaks anywhere."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if not line:
                line = word
            elif cell_len(line) + 1 + cell_len(word) <= width:
                line += f" {word}"
            else:
                lines.append(line)
                line = word
            if cell_len(line) > width:
                *full, line = _broken(line, width)
                lines += full
        lines.append(line)
    return lines


def fitted(text: str, width: int) -> list[str]:
    """Lines of a cell: wrap(), but names that take more than NAME_LINES are shortened."""
    words = (
        word if cell_len(word) <= width else _shortened(word, width, NAME_LINES) for word in text.split(" ")
    )
    return wrap(" ".join(words), width)


def fitted_head(text: str, width: int) -> list[str]:
    """Lines of a head: no more than HEAD_LINES in all."""
    return wrap(_shortened(text, width, HEAD_LINES), width)


def _shortened(text: str, width: int, most: int) -> str:
    """As much of both ends as fits so many lines."""
    if len(wrap(text, width)) <= most:
        return text
    for kept in range(min(len(text), most * width) - 1, 1, -1):
        shorter = f"{text[: kept - kept // 2].rstrip()}{ELLIPSIS}{text[len(text) - kept // 2 :].lstrip()}"
        if len(wrap(shorter, width)) <= most:
            return shorter
    return ELLIPSIS


def _broken(word: str, width: int) -> list[str]:
    """After dots, dashes and the like; at underscores only what is longer than a line by itself."""
    lines = [""]
    parts = (
        part
        for whole in _PARTS.findall(word)
        for part in ([whole] if cell_len(whole) <= width else _PIECES.findall(whole))
    )
    for part in parts:
        if cell_len(lines[-1]) + cell_len(part) <= width:
            lines[-1] += part
            continue
        if lines[-1]:
            lines.append("")
        *full, last = chop_cells(part, width) or [""]
        lines[-1:] = [*full, last]
    return lines
