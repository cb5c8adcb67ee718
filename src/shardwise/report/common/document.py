"""What every JSON document of ours shares: indented, UTF-8, `schema_version` first, and numbers that JSON doesn't have.

JSON has no NaN and no infinity, and null already means "not measured", so a number that isn't finite is the string "NaN",
"Infinity" or "-Infinity", as in the JSON mapping of Protocol Buffers (protobuf.dev/programming-guides/json).
"""

import dataclasses
import math
import types
import typing
from enum import Enum

import msgspec

from shardwise.core.errors import InputError
from shardwise.core.placement import Partial, Placement, Replicate, Shard, format_placement, parse_placement

_PLACEMENTS = frozenset(typing.get_args(Placement))
_Noun = typing.TypeVar("_Noun")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_document(table: dict[str, object]) -> bytes:
    """`table`, which has a schema_version, as one document that ends in a newline."""
    document = {"schema_version": table["schema_version"], **table}
    return msgspec.json.format(msgspec.json.encode(_name_non_finite(document)), indent=2) + b"\n"


def read_document(
    document: bytes, source: str, *, command: str, what: str, version: int
) -> dict[str, object]:
    """The table of a document that `shardwise COMMAND` wrote, of this version. Raises InputError, which names `source`."""
    try:
        table = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{source}: not valid JSON: {error}. Give the JSON file that shardwise {command} wrote."
        ) from None
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


class _Mismatch(Exception):  # noqa: N818
    """What is wrong and where: `Expected `int`, got `str` - at `$.rank``."""


def read_as(
    document: bytes, kind: type[_Noun], source: str, *, command: str, what: str, version: int
) -> _Noun:
    """A saved document as the dataclass that was written. Raises InputError, which names `source`, the field and what it should be."""
    table = read_document(document, source, command=command, what=what, version=version)
    try:
        found = _build(table, kind, "$")
    except _Mismatch as error:
        raise InputError(
            f"{source}: not a saved {what}: {error}. Give the JSON file that shardwise {command} wrote."
        ) from None
    assert isinstance(found, kind)
    return found


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
    return tuple(
        _build(item, kind, f"{path}[{index}]")
        for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )
