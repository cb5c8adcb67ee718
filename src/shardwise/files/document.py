"""Nouns <-> JSON: the one way in which results and Programs are written and read back. No code comes from a
file.

A dataclass is an object of its fields, a tuple an array, an enum its value, a placement the text of plan
files (`shard(1)`), a plan the text of its file, a rule `"PATTERN" (STYLE)`. What a dataclass works out from
its fields (its properties) is written beside them, for readers of the JSON, and ignored when it is read back,
as unknown fields are; a field that is missing takes its default. JSON has no NaN and no infinity, and null
means "not measured", so a number that isn't finite is the string "NaN", "Infinity" or "-Infinity", as in the
JSON mapping of Protocol Buffers (protobuf.dev/programming-guides/json). Reading is strict about types, and
bounded where a Form says so.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache

import msgspec

from shardwise.core.beside import Beside, PredictedStep
from shardwise.core.difference import Difference, RunProfile
from shardwise.core.dims import Dims
from shardwise.core.errors import InputError, PlanError
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.export import Export
from shardwise.core.look_up import LookUps
from shardwise.core.made_plan import MadePlan
from shardwise.core.measurement import Comparison
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Partial, Placement, Replicate, Shard, format_placement, parse_placement
from shardwise.core.plan import Plan
from shardwise.core.prediction_run import PredictionRun
from shardwise.core.rule import RuleRef
from shardwise.core.search import Search
from shardwise.core.sweep import Sweep
from shardwise.core.training import Training
from shardwise.core.verification import VerificationRun

SCHEMA_VERSION = 1
# (command, what it wrote) of each result that is read back
SAVED = {
    Comparison: ("compare", "comparison"),
    Explanation: ("explain", "explanation"),
    Contrast: ("explain", "contrast"),
    VerificationRun: ("verify", "verification"),
    RunProfile: ("diff", "run"),
    Difference: ("diff", "difference"),
    Beside: ("diff", "prediction beside a measurement"),
    PredictedStep: ("predict", "predicted step"),
    PredictionRun: ("predict", "prediction"),
    Sweep: ("predict", "sweep"),
    LookUps: ("predict", "look-ups"),
    Search: ("search", "search"),
    Training: ("train", "training"),
    MadePlan: ("plan", "made plan"),
    Export: ("export", "export"),
    Dims: ("explain", "dims"),
}
_PLACEMENTS = frozenset(typing.get_args(Placement))
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_Noun = typing.TypeVar("_Noun")
_Read = Callable[[object], object]


@dataclass(frozen=True, eq=False)
class Form:
    """What a kind of document has of its own. tags: dataclasses that stand for one another, and the value of
    `tag_field` that says which. arrays: dataclasses that are arrays of their fields. limits: of a field
    (class, name), or of all fields of a type. worked_out: whether properties are written."""

    tag_field: str = ""
    tags: Mapping[type, str] = field(default_factory=dict)
    arrays: frozenset[type] = frozenset()
    limits: Mapping[object, typing.Any] = field(default_factory=dict)
    worked_out: bool = True


RESULT = Form()


def write_document(noun: object) -> bytes:
    """A result, which has a schema_version, as one document: indented, UTF-8, its version first, a newline at
    the end."""
    table = written(noun)
    assert isinstance(table, dict)
    document = {"schema_version": table["schema_version"], **table}
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def settings_document(asked: object) -> bytes:
    """What was asked, as a run folder keeps it: fields only."""
    return msgspec.json.format(msgspec.json.encode(asked), indent=2) + b"\n"


def read_document(
    document: bytes, kind: type[_Noun], source: str = "", *, saved: tuple[str, str] | None = None
) -> _Noun:
    """A saved result, to be drawn again. Raises InputError, which names `source`, the field and what it
    should be."""
    command, what = saved or SAVED[kind]
    source = source or what
    advice = f"Give the JSON file that shardwise {command} wrote."
    try:
        table = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}. {advice}") from None
    version = table.get("schema_version") if isinstance(table, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{source}: schema_version is {version!r:.40}; this Shardwise reads {SCHEMA_VERSION}. "
            f"Draw it with the version of Shardwise that wrote it, or run the {what} again."
        )
    try:
        return read(table, kind)
    except (Mismatch, ValueError) as error:  # a ValueError: of a noun whose fields don't go together
        raise InputError(f"{source}: not a saved {what}: {error}. {advice}") from None


def worked_out(kind: type) -> tuple[str, ...]:
    """The names of a dataclass's properties; but for those that give its axes once more, as a Mesh."""
    properties = ((name, member) for name, member in vars(kind).items() if isinstance(member, property))
    return tuple(name for name, member in properties if not _is_mesh(member))


def _is_mesh(member: property) -> bool:
    return member.fget is not None and typing.get_type_hints(member.fget).get("return") is Mesh


def written(value: object, form: Form = RESULT) -> object:
    """A noun as what JSON has: objects, arrays, texts, numbers."""
    match value:
        case Shard() | Replicate() | Partial():
            return format_placement(value)
        case RuleRef():
            return str(value)
        case Plan():
            return value.to_toml()
        case Enum():
            return value.value
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case tuple() | list():
            return [written(item, form) for item in value]
        case dict():
            return {key: written(item, form) for key, item in value.items()}
        case _ if not dataclasses.is_dataclass(value):
            return value
    kind: typing.Any = type(value)
    names = _names(kind, form)
    if kind in form.arrays:
        return [written(getattr(value, name), form) for name in names]
    tag = {form.tag_field: form.tags[kind]} if kind in form.tags else {}
    return tag | {name: written(getattr(value, name), form) for name in names}


@cache
def _names(kind: typing.Any, form: Form) -> tuple[str, ...]:
    fields = tuple(each.name for each in dataclasses.fields(kind))
    return (*fields, *worked_out(kind)) if form.worked_out else fields


class Mismatch(Exception):  # noqa: N818
    """What is wrong and where: `Expected `int`, got `str` - at `$.rank``."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message, self.path = message, path

    def inside(self, step: str) -> "Mismatch":
        return Mismatch(self.message, step + self.path)

    def __str__(self) -> str:
        return f"{self.message} - at `${self.path}`"


def read(value: object, kind: type[_Noun], form: Form = RESULT) -> _Noun:
    """What `written` made, as the noun that it was. Raises Mismatch; what a noun refuses at its birth passes
    through."""
    wanted: typing.Any = kind
    made = _reader(wanted, form)(value)
    assert isinstance(made, kind)
    return made


@cache
def _reader(kind: typing.Any, form: Form) -> _Read:
    """How values of a kind are read. msgspec has no unions of dataclasses, which a Placement and an Item
    are."""
    choices = frozenset(typing.get_args(kind)) if isinstance(kind, types.UnionType) else frozenset({kind})
    plain = choices - {types.NoneType}
    if plain >= _PLACEMENTS:
        inner: _Read = _read_placement
    elif plain <= frozenset(form.tags):
        inner = _tagged({form.tags[each]: _fields(each, form) for each in plain}, form.tag_field)
    else:
        inner = _one(next(iter(plain)), form) if len(plain) == 1 else _leaf(kind, False)
    return inner if plain == choices else lambda value: None if value is None else inner(value)


def _one(kind: typing.Any, form: Form) -> _Read:
    if kind is RuleRef:
        return lambda value: RuleRef.parse(str(_leaf(str, False)(value)))
    if kind is Plan:
        return lambda value: _read_plan(str(_leaf(str, False)(value)))
    if dataclasses.is_dataclass(kind):
        return _array(kind, form) if kind in form.arrays else _fields(kind, form)
    if typing.get_origin(kind) is tuple:
        return _tuple(typing.get_args(kind), form)
    return _leaf(form.limits.get(kind, kind), kind is float)


def _leaf(kind: typing.Any, is_float: bool) -> _Read:
    def one(value: object) -> object:
        if is_float and isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at `$")
            raise Mismatch(message, path.removesuffix("`")) from None

    return one


def _read_plan(text: str) -> Plan:
    try:
        return Plan.from_toml(text)
    except PlanError as error:
        raise Mismatch(str(error).rstrip(".")) from None


def _read_placement(value: object) -> Placement:
    if not isinstance(value, str):
        _leaf(str, False)(value)
    try:
        return parse_placement(str(value)[:100])
    except ValueError as error:
        raise Mismatch(str(error).rstrip(".")) from None


def _fields(kind: typing.Any, form: Form) -> _Read:
    hints = typing.get_type_hints(kind)
    readers = {
        each.name: _field_reader(kind, each.name, hints[each.name], form) for each in dataclasses.fields(kind)
    }
    required = [
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]

    def fields(value: object) -> object:
        if not isinstance(value, dict):
            raise Mismatch("Expected `object`")
        for name in required:
            if name not in value:
                raise Mismatch(f"Object missing required field `{name}`")
        given = {}
        for name, reader in readers.items():
            if name in value:
                try:
                    given[name] = reader(value[name])
                except Mismatch as error:
                    raise error.inside(f".{name}") from None
        return kind(**given)

    return fields


def _field_reader(kind: type, name: str, hint: typing.Any, form: Form) -> _Read:
    limited = form.limits.get((kind, name))
    return _reader(hint, form) if limited is None else _leaf(limited, False)


def _array(kind: typing.Any, form: Form) -> _Read:
    names = [each.name for each in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    readers = tuple(_field_reader(kind, name, hints[name], form) for name in names)
    return lambda value: kind(*_items(value, readers))


def _tagged(readers: Mapping[str, _Read], tag_field: str) -> _Read:
    def tagged(value: object) -> object:
        if not isinstance(value, dict):
            raise Mismatch("Expected `object`")
        tag = value.get(tag_field)
        if not isinstance(tag, str) or tag not in readers:
            raise Mismatch(f"Invalid value {tag!r:.40}", f".{tag_field}")
        return readers[tag](value)

    return tagged


def _tuple(kinds: tuple[typing.Any, ...], form: Form) -> _Read:
    if kinds[-1] is not Ellipsis:
        readers = tuple(_reader(kind, form) for kind in kinds)
        return lambda value: _items(value, readers)
    reader = _reader(kinds[0], form)
    return lambda value: _items(value, (reader,) * len(value) if isinstance(value, list) else ())


def _items(value: object, readers: tuple[_Read, ...]) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise Mismatch("Expected `array`")
    if len(readers) != len(value):
        raise Mismatch(f"Expected `array` of length {len(readers)}, got {len(value)}")
    items = []
    for index, (item, reader) in enumerate(zip(value, readers, strict=True)):
        try:
            items.append(reader(item))
        except Mismatch as error:
            raise error.inside(f"[{index}]") from None
    return tuple(items)
