"""Style: what a plan's rule does to a module, with its arguments, as data; read and written as a plan file
has it. What a style does to tensors is in parallel/; this file knows only which arguments it takes."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeVar

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.errors import PlanError
from shardwise.core.held import Held, check_pieces, count_of, format_pieces, parse_pieces
from shardwise.core.mesh import EXPERTS_AXIS, TENSOR_AXIS
from shardwise.core.placement import Partial, Placement, format_placement, parse_placement
from shardwise.core.toml_text import TomlValue

E = TypeVar("E", bound=StrEnum)


class StyleName(StrEnum):
    """What a rule does to a module, and the arguments that a plan may give with it. All else that is known of
    a style its own file says: parallel/styles/NAME.py."""

    arguments: frozenset[str]

    def __new__(cls, name: str, *arguments: str) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.arguments = frozenset(arguments)
        return member

    ROWWISE = "rowwise", "input", "output", "pieces", "parameters", "divide", "gradient"
    COLWISE = "colwise", "input", "output", "pieces", "parameters", "divide"
    ROUTED = "routed", "ownership"
    REPLICATED = "replicated", "output"
    SEQUENCE_PARALLEL = "sequence_parallel"
    GATHER_INPUT = "gather_input", "from", "output", "every_input", "parameters", "divide", "cut"
    REPLICATE = "replicate", "gradient"
    LOCAL = "local", "parameters", "divide", "cut"
    WHOLE = "whole", "input", "output", "pieces"
    SPLIT_INPUT = "split_input", "parameters", "divide"
    EXPERTS = "experts", "axis", "output", "parameters", "divide", "gradient"

    @property
    def input_key(self) -> str:
        """What a plan calls the placement of its input."""
        return "from" if "from" in self.arguments else "input"


class Ownership(StrEnum):
    """Which rank owns which row of a routed table: contiguous chunks, or dealt round-robin (against the hot
    rank)."""

    CONTIGUOUS = "contiguous"
    INTERLEAVED = "interleaved"


class ExpertsAxis(StrEnum):
    """Over which axis of the mesh experts are shared out, each rank some of them."""

    EXPERTS = EXPERTS_AXIS
    TENSORS = TENSOR_AXIS


@dataclass(frozen=True, slots=True)
class Style:
    """A style and its arguments; None means the style's own default for the kind of module it meets (see
    docs/plans.md).

    pieces: sizes of what lies one after the other in the dim that is cut; parts: see Held. parameters: how
    those are held of which the class doesn't tell it, by their name from the module on. divide: names of
    integer attributes that count what is cut, from the module on; see count_of(). gradient: Partial where
    each rank computes a part of it: of a whole parameter's, or of what a rowwise module gives. every_input:
    not the first tensor's gradient alone is a part. cut: of which arguments of its forward a rank takes its
    part, by their names. axis: over which experts are shared out.
    """

    name: StyleName
    input: Placement | None = None
    output: Placement | None = None
    ownership: Ownership = Ownership.CONTIGUOUS
    pieces: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    parameters: tuple[tuple[str, Held], ...] = ()
    divide: tuple[str, ...] = ()
    gradient: Partial | None = None
    every_input: bool = False
    cut: tuple[tuple[str, ArgumentCut], ...] = ()
    axis: ExpertsAxis = ExpertsAxis.EXPERTS

    def __post_init__(self) -> None:
        _refuse_unknown(self.name, sorted(self._given()))
        with _as_plan_error("pieces"):
            check_pieces(self.pieces, self.parts)
        with _as_plan_error("divide"):
            counts = [count_of(each)[0] for each in self.divide]
        for what, names in (("parameters", [name for name, _ in self.parameters]), ("divide", counts)):
            for name in names:
                if not all(name.split(".")):
                    raise PlanError(f'{what}: "{name}" is no name. Write a dotted name, from the module on.')
                if list(names).count(name) > 1:
                    raise PlanError(f'{what} has "{name}" twice. Keep one.')

    @classmethod
    def from_value(cls, value: object) -> Self:
        """A style as a plan file has it: a name, or a table with `style` and arguments. Raises PlanError."""
        if isinstance(value, str):
            return cls(choice(StyleName, value, "style"))
        if not isinstance(value, Mapping):
            raise PlanError(
                f'a style is a name or a table such as {{ style = "rowwise" }}, not {value!r:.80}.'
            )
        arguments = dict(value)
        name = choice(StyleName, arguments.pop("style", None), "style")
        _refuse_unknown(name, arguments)
        pieces, parts = _pieces(arguments.get("pieces"))
        return cls(
            name,
            input=_placement(arguments, name.input_key),
            output=_placement(arguments, "output"),
            ownership=choice(Ownership, arguments.get("ownership", Ownership.CONTIGUOUS), "ownership"),
            pieces=pieces,
            parts=parts,
            parameters=_parameters(arguments.get("parameters", {})),
            divide=_names(arguments.get("divide", [])),
            gradient=_gradient(arguments.get("gradient")),
            every_input=_yes(arguments.get("every_input", False), "every_input"),
            cut=_arguments_cut(arguments.get("cut", {})),
            axis=choice(ExpertsAxis, arguments.get("axis", ExpertsAxis.EXPERTS), "axis"),
        )

    def to_value(self) -> str | dict[str, TomlValue]:
        """The inverse of from_value."""
        given = self._given()
        return {"style": str(self.name), **given} if given else str(self.name)

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})" if self.arguments else str(self.name)

    @property
    def arguments(self) -> str:
        """Those that are given, for people: `input=shard(1), output=replicate`."""
        return ", ".join(f"{key}={_shown(value)}" for key, value in self._given().items())

    def _given(self) -> dict[str, TomlValue]:
        """The arguments that are given, as a plan file has them."""
        placements = {self.name.input_key: self.input, "output": self.output, "gradient": self.gradient}
        given: dict[str, TomlValue] = {
            key: format_placement(value) for key, value in placements.items() if value is not None
        }
        if self.ownership is not Ownership.CONTIGUOUS:
            given["ownership"] = str(self.ownership)
        if self.pieces:
            given["pieces"] = format_pieces(self.pieces, self.parts)
        if self.parameters:
            given["parameters"] = {name: str(held) for name, held in self.parameters}
        if self.divide:
            given["divide"] = list(self.divide)
        if self.every_input:
            given["every_input"] = True
        if self.cut:
            given["cut"] = {name: str(how) for name, how in self.cut}
        if self.axis is not ExpertsAxis.EXPERTS:
            given["axis"] = str(self.axis)
        return given


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    cutoff = 0.6 if len(name) > 3 else 0.5  # of two letters one is half
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f' Did you mean "{near[0]}"?' if near else ""


def choice(kind: type[E], value: object, what: str) -> E:
    try:
        return kind(str(value)) if value is not None else kind("")
    except ValueError:
        allowed = [str(member) for member in kind]
        shown, hint = "missing" if value is None else json.dumps(value, default=str)[:80], ""
        if isinstance(value, str):
            shown, hint = f'"{value}"', suggest(value, allowed)
        raise PlanError(f"{what} is {shown}.{hint} Allowed: {', '.join(allowed)}.") from None


def _placement(arguments: Mapping[str, object], key: str) -> Placement | None:
    with _as_plan_error(key):
        return parse_placement(str(arguments[key])) if key in arguments else None


@contextmanager
def _as_plan_error(key: str) -> Iterator[None]:
    """A ValueError from inside as the PlanError of an argument."""
    try:
        yield
    except ValueError as error:
        raise PlanError(f"{key}: {error}") from None


def _pieces(value: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if value is None:
        return (), ()
    with _as_plan_error("pieces"):
        return parse_pieces(str(value))


def _parameters(value: object) -> tuple[tuple[str, Held], ...]:
    if not isinstance(value, Mapping):
        raise PlanError(f'parameters is {value!r:.80}. Write a table such as {{ weight = "shard(0)" }}.')
    found = []
    for name, text in value.items():
        with _as_plan_error(f'parameters: "{name}"'):
            found.append((str(name), Held.parse(str(text))))
    return tuple(found)


def _arguments_cut(value: object) -> tuple[tuple[str, ArgumentCut], ...]:
    if not isinstance(value, Mapping):
        raise PlanError(f'cut is {value!r:.80}. Write a table such as {{ alibi = "shard(0)" }}.')
    found = []
    for name, text in value.items():
        with _as_plan_error(f'cut: "{name}"'):
            found.append((str(name), ArgumentCut.parse(str(text))))
    return tuple(found)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PlanError(f'divide is {value!r:.80}. Write a list of names such as ["num_heads"].')
    return tuple(value)


def _yes(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{key} is {value!r:.40}. Allowed: true, false.")
    return value


def _gradient(value: object) -> Partial | None:
    if value is None or str(value).strip().lower() == "partial":
        return None if value is None else Partial()
    raise PlanError(f'gradient is "{value}". Allowed: partial.')


def _refuse_unknown(name: StyleName, arguments: Iterable[object]) -> None:
    for key in arguments:
        if key not in name.arguments:
            allowed = ", ".join(sorted(name.arguments)) or "none"
            raise PlanError(f'style {name} takes no argument "{key}". Allowed: {allowed}.')


def _shown(value: TomlValue) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return value
        case list():
            return "+".join(value)
        case _:
            return "{" + ", ".join(f"{key}: {held}" for key, held in value.items()) + "}"
