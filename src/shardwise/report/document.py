"""What every JSON document of ours shares: indented, UTF-8, `schema_version` first, and numbers that JSON doesn't have.

JSON has no NaN and no infinity, and null already means "not measured", so a number that isn't finite is the string "NaN",
"Infinity" or "-Infinity", as in the JSON mapping of Protocol Buffers (protobuf.dev/programming-guides/json).
"""

import dataclasses
import math
from enum import Enum

import msgspec

from shardwise.core.errors import InputError
from shardwise.core.placement import Partial, Replicate, Shard, format_placement

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_document(table: dict[str, object]) -> bytes:
    """`table`, which has a schema_version, as one document that ends in a newline."""
    document = {"schema_version": table["schema_version"], **table}
    return msgspec.json.format(msgspec.json.encode(_name_non_finite(document)), indent=2) + b"\n"


def read_document(document: bytes, source: str, *, command: str, what: str, version: int) -> dict[str, object]:
    """The table of a document that `shardwise COMMAND` wrote, of this version. Raises InputError, which names `source`."""
    try:
        table = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}. Give the JSON file that shardwise {command} wrote.") from None
    found = table.get("schema_version") if isinstance(table, dict) else None
    if found != version or isinstance(found, bool):
        raise InputError(
            f"{source}: schema_version is {found!r:.40}; this Shardwise reads {version}. "
            f"Draw it with the version of Shardwise that wrote it, or run the {what} again."
        )
    assert isinstance(table, dict)
    return table


def table_of(value: object) -> dict[str, object]:
    """A dataclass as a table: its fields and what it works out from them; placements as the text of plan files."""
    found = _builtins(value)
    assert isinstance(found, dict)
    return found


def worked_out(kind: type) -> tuple[str, ...]:
    """The names of a dataclass's properties: written beside its fields."""
    return tuple(name for name, member in vars(kind).items() if isinstance(member, property))


def _builtins(value: object) -> object:
    match value:
        case Shard() | Replicate() | Partial():
            return format_placement(value)
        case Enum():
            return value.value
        case tuple():
            return [_builtins(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            names = (*(field.name for field in dataclasses.fields(value)), *worked_out(type(value)))
            return {name: _builtins(getattr(value, name)) for name in names}
        case _:
            return value


def _name_non_finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case dict():
            return {key: _name_non_finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_name_non_finite(item) for item in value]
        case _:
            return value
