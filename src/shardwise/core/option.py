"""How a noun's field is asked for: in words, and within which bounds. Commands make options of it, case files
comments.

A field that a user may choose is `name: Annotated[type, Option("what it is")] = default`.
"""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import isfinite
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from shardwise.core.errors import OptionError
from shardwise.core.plan import suggest


class Paths(Enum):
    """Values that are paths: all; those that end in .toml; of a model's, those of a configuration."""

    ALL = "all"
    TOML = "toml"
    CONFIG = "config"


@dataclass(frozen=True, slots=True)
class Option:
    """about: what it is, in a sentence. panel: where a command's help shows it. least, most: bounds, both
    allowed; a default may lie outside. flag: as a command takes it, where it isn't --name. shown: the default
    in words, where the value doesn't say it. key: in case files, where it isn't the field's name.
    is_argument: given by its place. is_hidden: only to be refused by name. paths: which of its values are
    paths (core/named_path.py). elsewhere: values that another option takes, each with a sentence that names
    it."""

    about: str
    panel: str | None = None
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    shown: str = ""
    key: str = ""
    is_argument: bool = False
    is_hidden: bool = False
    paths: Paths | None = None
    elsewhere: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A field with its Option. kind: its type; default: None where the noun has none."""

    field: str
    key: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """`--name`, and `--name/--no-name` for what is on by default."""
        name = f"--{self.key.replace('_', '-')}"
        if self.option.flag:
            return self.option.flag
        return f"{name}/--no-{name[2:]}" if self.default is True else name

    @property
    def is_many(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def is_optional(self) -> bool:
        return types.NoneType in get_args(self.kind)


@cache
def options_of(noun: Any) -> tuple[Asked, ...]:
    """Every field of a dataclass that has an Option."""
    hints = get_type_hints(noun, include_extras=True)
    return tuple(
        Asked(field.name, option.key or field.name, hints[field.name].__origin__, _default(field), option)
        for field in dataclasses.fields(noun)
        for option in getattr(hints[field.name], "__metadata__", ())
        if isinstance(option, Option)
    )


def check_options(noun: Any) -> None:
    """For __post_init__: raises OptionError for a value that isn't offered."""
    kind: Any = type(noun)
    for asked in options_of(kind):
        option, value = asked.option, getattr(noun, asked.field)
        name = asked.flag.partition("/")[0]
        if option.choices and value is not None:
            check_choice(name, value, option.choices, dict(option.elsewhere))
        if isinstance(value, float) and not isfinite(value):
            raise OptionError(f"{name} is {value}. Use a finite number.")
        if option.least is None or value is None or value == asked.default:
            continue
        if value < option.least:
            raise OptionError(f"{name} is {value}. Use {option.least:g} or more.")


def check_choice(
    option: str, value: str, allowed: tuple[str, ...], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raises OptionError for a value that isn't offered."""
    if value not in allowed:
        hint = f" {elsewhere[value]}" if value in elsewhere else suggest(value, allowed)
        raise OptionError(f'{option} is "{value}".{hint} Allowed: {", ".join(allowed)}.')


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()
