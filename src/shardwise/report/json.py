"""Comparison <-> one JSON document: indented, UTF-8, `schema_version` first, fields named as in core/measurement.py.

JSON has no NaN and no infinity, and null already means "not measured", so a number that isn't finite is the string "NaN",
"Infinity" or "-Infinity", as in the JSON mapping of Protocol Buffers (protobuf.dev/programming-guides/json). Nothing is lost:
comparison_from_json(comparison_json(c)) is c, but for NaN, which equals nothing. Reading is strict about types and versions;
unknown fields are ignored.
"""

import dataclasses
import math
import types
import typing

import msgspec

from shardwise.core.errors import InputError
from shardwise.core.measurement import Comparison

SCHEMA_VERSION = 1

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def comparison_json(comparison: Comparison) -> bytes:
    """The whole comparison as one JSON document that ends in a newline."""
    table = msgspec.to_builtins(comparison)
    document = {"schema_version": table["schema_version"], **table}
    return msgspec.json.format(msgspec.json.encode(_name_non_finite(document)), indent=2) + b"\n"


def comparison_from_json(document: bytes, source: str = "comparison") -> Comparison:
    """A saved comparison, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    try:
        table = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}. Give the JSON file that shardwise compare wrote.") from None
    version = table.get("schema_version") if isinstance(table, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{source}: schema_version is {version!r:.40}; this Shardwise reads {SCHEMA_VERSION}. "
            "Draw it with the version of Shardwise that wrote it, or run the comparison again."
        )
    try:
        return msgspec.convert(_read_non_finite(table, Comparison), Comparison)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: not a saved comparison: {error}. Give the JSON file that shardwise compare wrote.") from None


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


def _read_non_finite(value: object, kind: typing.Any) -> object:
    """`value` with "NaN" and its kin as floats, but only where the type asks for a float: a plan may be called NaN."""
    match value:
        case str():
            wants_float = kind is float or (isinstance(kind, types.UnionType) and float in typing.get_args(kind))
            return _NON_FINITE.get(value, value) if wants_float else value
        case list():
            kinds = [item for item in typing.get_args(kind) if item is not Ellipsis]
            return [_read_non_finite(item, kinds[min(index, len(kinds) - 1)] if kinds else None) for index, item in enumerate(value)]
        case dict():
            wanted = next((item for item in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(item)), None)
            fields = typing.get_type_hints(wanted) if wanted else {}
            return {key: _read_non_finite(item, fields.get(key)) for key, item in value.items()}
        case _:
            return value
