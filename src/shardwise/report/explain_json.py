"""Explanation and Contrast <-> one JSON document, fields named as in core/explanation.py; how it is written: report/document.py.

Placements are the text that plan files have (`shard(1)`, `replicate`, `partial`). What the dataclasses work out from their fields
(`wire_bytes`, `total_wire_bytes`, `total_bytes`, `tokens`) is written too, for readers of the JSON, and ignored when it is read back.
Nothing is lost: explanation_from_json(explanation_json(e)) is e. Reading is strict about types and versions; unknown fields are ignored.
docs/explain-json.md says what each field means.
"""

import dataclasses
import types
import typing

import msgspec

from shardwise.core.errors import InputError
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.placement import Placement, parse_placement
from shardwise.report.document import NON_FINITE, read_document, table_of, write_document

SCHEMA_VERSION = 1

_PLACEMENTS = frozenset(typing.get_args(Placement))


def explanation_json(explanation: Explanation) -> bytes:
    """The whole explanation as one JSON document that ends in a newline."""
    return write_document(table_of(explanation))


def contrast_json(contrast: Contrast) -> bytes:
    """The whole contrast, both explanations in it, as one JSON document that ends in a newline."""
    return write_document(table_of(contrast))


def explanation_from_json(document: bytes, source: str = "explanation") -> Explanation:
    """A saved explanation, to be drawn again. Raises InputError, which names `source`, the field and what it should be."""
    found = _read(document, Explanation, source, "explanation")
    assert isinstance(found, Explanation)
    return found


def contrast_from_json(document: bytes, source: str = "contrast") -> Contrast:
    """A saved contrast, to be drawn again. Raises InputError, as explanation_from_json does."""
    found = _read(document, Contrast, source, "contrast")
    assert isinstance(found, Contrast)
    return found


class _Mismatch(Exception):  # noqa: N818
    """What is wrong and where: `Expected `int`, got `str` - at `$.rank``."""


def _read(document: bytes, kind: type, source: str, what: str) -> object:
    table = read_document(document, source, command="explain", what=what, version=SCHEMA_VERSION)
    try:
        return _build(table, kind, "$")
    except _Mismatch as error:
        raise InputError(f"{source}: not a saved {what}: {error}. Give the JSON file that shardwise explain wrote.") from None


def _build(value: object, kind: typing.Any, path: str) -> object:
    """`value` as a `kind`. msgspec has no unions of dataclasses, which a Placement is."""
    choices = frozenset(typing.get_args(kind)) if isinstance(kind, types.UnionType) else frozenset()
    if value is None and types.NoneType in choices:
        return None
    if choices >= _PLACEMENTS:
        return _build_placement(value, path)
    wanted = next(iter(choices - {types.NoneType})) if len(choices - {types.NoneType}) == 1 else kind
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _build_dataclass(value, wanted, path)
    if typing.get_origin(wanted) is tuple:
        return _build_tuple(value, typing.get_args(wanted), path)
    if wanted is float and isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise _Mismatch(f"{error} - at `{path}`") from None


def _build_placement(value: object, path: str) -> Placement:
    try:
        return parse_placement(value if isinstance(value, str) else msgspec.convert(value, str))
    except ValueError as error:
        raise _Mismatch(f"{str(error).rstrip('.')} - at `{path}`") from None


def _build_dataclass(value: object, kind: type, path: str) -> object:
    if not isinstance(value, dict):
        raise _Mismatch(f"Expected `object` - at `{path}`")
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            given[field.name] = _build(value[field.name], hints[field.name], f"{path}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise _Mismatch(f"Object missing required field `{field.name}` - at `{path}`")
    return kind(**given)


def _build_tuple(value: object, kinds: tuple[typing.Any, ...], path: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise _Mismatch(f"Expected `array` - at `{path}`")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _Mismatch(f"Expected `array` of length {len(kinds)}, got {len(value)} - at `{path}`")
    return tuple(_build(item, kind, f"{path}[{index}]") for index, (item, kind) in enumerate(zip(value, kinds, strict=True)))
