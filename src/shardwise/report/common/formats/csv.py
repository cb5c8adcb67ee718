"""Each table as a CSV file (RFC 4180): values in SI units with all their digits, the unit in the head. Lines
below a row are a last column.

A text that a spreadsheet would take for a formula begins with an apostrophe, as OWASP advises: names may come
from anyone's files.
"""

import csv
import io

from shardwise.report.common.plain import plain
from shardwise.report.common.room import Room
from shardwise.report.common.table import Cell, Column, Row, RowKind, Table

_FORMULA = ("=", "+", "-", "@")


def files(room: Room, result: object, **page: object) -> dict[str, bytes]:
    tables = room.report(result).tables()
    return {f"tables/{table.key}.csv": _written(table.without_bars()).encode() for table in tables}


def _written(table: Table) -> str:
    out = io.StringIO()
    write = csv.writer(out)
    has_sections = any(row.kind is RowKind.HEADING for row in table.rows)
    has_below = any(row.below for row in table.rows)
    has_about = [any(_about(row, index) for row in table.rows) for index in range(len(table.columns))]
    names = [_name(column) for column in table.columns]
    head = [
        field
        for name, more in zip(names, has_about, strict=True)
        for field in (name, f"{name}, more")[: 1 + more]
    ]
    write.writerow([*(("section",) * has_sections), *head, *(("about",) * has_below)])
    section = ""
    for row in table.rows:
        if row.kind is RowKind.HEADING:
            section = row.cells[0].read(table.columns[0])
            continue
        fields: list[object] = [_safe(section)] if has_sections else []
        for index, (cell, column) in enumerate(zip(row.cells, table.columns, strict=True)):
            fields += [_field(cell, column), _safe(cell.about)][: 1 + has_about[index]]
        write.writerow([*fields, *((_safe(_below(row)),) * has_below)])
    return out.getvalue()


def _name(column: Column) -> str:
    name = f"{column.of}, {column.name}" if column.of else column.name
    return f"{name} ({column.format.unit})" if column.format.unit else name


def _about(row: Row, index: int) -> str:
    return "" if row.kind is RowKind.HEADING else row.cells[index].about


def _field(cell: Cell, column: Column) -> object:
    if isinstance(cell.value, int | float):
        return cell.value
    return _safe(cell.read(column) if cell.value is None else cell.value)


def _below(row: Row) -> str:
    return " ".join(f"{line.lead} {line.text}".strip() for line in row.below)


def _safe(text: str) -> str:
    return f"'{plain(text)}" if text.startswith(_FORMULA) else plain(text)
