"""The report for a pull request's comment: words and tables in GitHub's Markdown. Names stay text: nothing in
them is read as Markdown or HTML."""

import re

from shardwise.report.common.plain import plain
from shardwise.report.common.room import Room
from shardwise.report.common.table import Cell, Column, Line, Row, RowKind, Table, Tone, Words

_STRONG = frozenset({Tone.STRONG, Tone.BAD, Tone.HEADING})


def files(room: Room, result: object, **page: object) -> dict[str, bytes]:
    report = room.report(result)
    blocks = [
        _table(block.without_bars().cut(block.short)) if isinstance(block, Table) else _words(block)
        for block in report.blocks
    ]
    return {f"{room.name}.md": "\n\n".join([f"## {_text(report.title)}", *blocks, ""]).encode()}


def _text(text: str) -> str:
    escaped = re.sub(r"([\\`*_{}\[\]|#~!])", r"\\\1", plain(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")


def _line(line: Line) -> str:
    text = f"**{_text(line.text)}**" if line.tone in _STRONG and line.text else _text(line.text)
    return f"**{_text(line.lead)}** {text}" if line.lead else text


def _words(words: Words) -> str:
    mark = "- " if words.items else "> " if words.boxed else ""
    lines = [f"{mark}{_line(line)}" for line in words.lines]
    body = ("\n" if words.items else f"\n{mark.strip()}\n").join(lines)
    return f"### {_text(words.title)}\n\n{body}" if words.title else body


def _table(table: Table) -> str:
    has_below = any(row.below for row in table.rows)
    heads = [(table.headed and _text(column.name)) or " " for column in table.columns] + [" "] * has_below
    aligned = ["--:" if column.is_number else ":--" for column in table.columns] + [":--"] * has_below
    lines = [_joined(heads), _joined(aligned), *(_row(row, table, has_below) for row in table.rows)]
    notes = "".join(f"\n\n{_line(note)}" for note in table.notes)
    title = f"### {_text(table.title)}\n\n" if table.title else ""
    return title + "\n".join(lines) + notes


def _row(row: Row, table: Table, has_below: bool) -> str:
    if row.kind is RowKind.HEADING:
        title = f"**{_text(row.cells[0].read(table.columns[0]))}**"
        return _joined([title, *[" "] * (len(table.columns) - 1 + has_below)])
    cells = [_cell(cell, column, row) for cell, column in zip(row.cells, table.columns, strict=True)]
    return _joined([*cells, *(["<br>".join(map(_line, row.below))] * has_below)])


def _cell(cell: Cell, column: Column, row: Row) -> str:
    text = _text(cell.read(column))
    if text and (row.kind is RowKind.TOTAL or cell.tone in _STRONG):
        text = f"**{text}**"
    return f"{text}<br>{_text(cell.about)}" if cell.about else text


def _joined(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
