"""Comparison <-> one JSON document, fields named as in core/measurement.py; how it is written: report/document.py.

Nothing is lost: comparison_from_json(comparison_json(c)) is c, but for NaN, which equals nothing. Reading is strict about types and
versions; unknown fields are ignored.
"""

import dataclasses
import types
import typing

import msgspec

from shardwise.core.errors import InputError
from shardwise.core.measurement import Comparison
from shardwise.report.common.document import NON_FINITE, read_document, write_document

SCHEMA_VERSION = 1


def comparison_json(comparison: Comparison) -> bytes:
    """The whole comparison as one JSON document that ends in a newline."""
    return write_document(msgspec.to_builtins(comparison))


def comparison_from_json(document: bytes, source: str = "comparison") -> Comparison:
    """A saved comparison, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    table = read_document(document, source, command="compare", what="comparison", version=SCHEMA_VERSION)
    try:
        return msgspec.convert(_read_non_finite(table, Comparison), Comparison)
    except msgspec.ValidationError as error:
        raise InputError(
            f"{source}: not a saved comparison: {error}. Give the JSON file that shardwise compare wrote."
        ) from None


def _read_non_finite(value: object, kind: typing.Any) -> object:
    """`value` with "NaN" and its kin as floats, but only where the type asks for a float: a plan may be called NaN."""
    match value:
        case str():
            wants_float = kind is float or (
                isinstance(kind, types.UnionType) and float in typing.get_args(kind)
            )
            return NON_FINITE.get(value, value) if wants_float else value
        case list():
            kinds = [item for item in typing.get_args(kind) if item is not Ellipsis]
            return [
                _read_non_finite(item, kinds[min(index, len(kinds) - 1)] if kinds else None)
                for index, item in enumerate(value)
            ]
        case dict():
            wanted = next(
                (item for item in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(item)), None
            )
            fields = typing.get_type_hints(wanted) if wanted else {}
            return {key: _read_non_finite(item, fields.get(key)) for key, item in value.items()}
        case _:
            return value
