"""Plan: a named set of rules (pattern of module names -> style), as data. TOML text in and out; no files are
opened here.

Patterns are dotted module names; `*` stands for one level, `**` for any number of levels, `.` alone for the
model itself. Where two rules
match a module, the later one holds. What a style does to tensors is in parallel/; this file knows only which
arguments a style takes.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from operator import and_, or_
from typing import Self, TypeVar

from shardwise.core.errors import PlanError
from shardwise.core.held import Held, check_pieces, count_of, format_pieces, parse_pieces
from shardwise.core.layer_name import any_layer
from shardwise.core.placement import Partial, Placement, format_placement, parse_placement
from shardwise.core.rule import RuleRef
from shardwise.core.toml_text import TomlValue, comment, quote, toml

E = TypeVar("E", bound=StrEnum)
ROOT = "."
"""The pattern of the model itself, for parameters of its own."""


class Engine(StrEnum):
    """Who carries a plan out."""

    NATIVE = "native"
    DTENSOR = "dtensor"


class TheirPlan(StrEnum):
    """What can stand in a plan's place where the rules aren't ours. unsharded: one rank holds the whole
    model. hf: a Hugging Face model's own tp_plan, carried out by transformers. own: the model came sharded
    from the user's factory."""

    UNSHARDED = "unsharded"
    HF = "hf"
    OWN = "own"


class Family(StrEnum):
    """Models with the same module names, for which a built-in plan has the same rules."""

    LLAMA = "llama"
    GPT = "gpt"


class StyleName(StrEnum):
    """What a rule does to a module, and the arguments that a plan may give with it. All else that is known of
    a style its own file says: parallel/styles/NAME.py."""

    arguments: frozenset[str]

    def __new__(cls, name: str, *arguments: str) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.arguments = frozenset(arguments)
        return member

    ROWWISE = "rowwise", "input", "output", "pieces", "parameters", "divide"
    COLWISE = "colwise", "input", "output", "pieces", "parameters", "divide"
    ROUTED = "routed", "ownership"
    REPLICATED = "replicated", "output"
    SEQUENCE_PARALLEL = "sequence_parallel"
    GATHER_INPUT = "gather_input", "from", "output", "every_input", "parameters", "divide"
    REPLICATE = "replicate", "gradient"
    LOCAL = "local", "parameters", "divide"
    WHOLE = "whole", "input", "output"
    SPLIT_INPUT = "split_input", "parameters", "divide"

    @property
    def input_key(self) -> str:
        """What a plan calls the placement of its input."""
        return "from" if "from" in self.arguments else "input"


class Ownership(StrEnum):
    """Which rank owns which row of a routed table: contiguous chunks, or dealt round-robin (against the hot
    rank)."""

    CONTIGUOUS = "contiguous"
    INTERLEAVED = "interleaved"


class ReduceScatter(StrEnum):
    """How the native engine carries out a reduce-scatter.

    backend: the process group's own. pairwise: an all-to-all and a local sum, which sends (n-1)/n of the
    tensor (gloo's own sends as much as an all-reduce). auto: pairwise on gloo, backend elsewhere.
    """

    AUTO = "auto"
    BACKEND = "backend"
    PAIRWISE = "pairwise"


@dataclass(frozen=True, slots=True)
class Style:
    """A style and its arguments; None means the style's own default for the kind of module it meets (see
    docs/plans.md).

    pieces: sizes of what lies one after the other in the dim that is cut; parts: see Held. parameters: how
    those are held of which the class doesn't tell it, by their name from the module on. divide: names of
    integer attributes that count what is cut, from the module on; see count_of(). gradient: Partial where
    each rank computes a part of it. every_input: not the first tensor's gradient alone is a part.
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
            return cls(_choice(StyleName, value, "style"))
        if not isinstance(value, Mapping):
            raise PlanError(
                f'a style is a name or a table such as {{ style = "rowwise" }}, not {value!r:.80}.'
            )
        arguments = dict(value)
        name = _choice(StyleName, arguments.pop("style", None), "style")
        _refuse_unknown(name, arguments)
        pieces, parts = _pieces(arguments.get("pieces"))
        return cls(
            name,
            input=_placement(arguments, name.input_key),
            output=_placement(arguments, "output"),
            ownership=_choice(Ownership, arguments.get("ownership", Ownership.CONTIGUOUS), "ownership"),
            pieces=pieces,
            parts=parts,
            parameters=_parameters(arguments.get("parameters", {})),
            divide=_names(arguments.get("divide", [])),
            gradient=_gradient(arguments.get("gradient")),
            every_input=_yes(arguments.get("every_input", False), "every_input"),
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
        return given


@dataclass(frozen=True, slots=True)
class Rule:
    """All modules whose name matches `pattern` get `style`."""

    pattern: str
    style: Style

    def __post_init__(self) -> None:
        if self.pattern != ROOT and (not self.pattern or not all(self.pattern.split("."))):
            raise PlanError(
                f'"{self.pattern}" is no pattern. Write a dotted module name; * is one level, ** any number.'
            )

    def matches(self, module: str) -> bool:
        """module: its name, "" for the model itself."""
        if not module or self.pattern == ROOT:
            return not module and self.pattern == ROOT
        names = module.split(".")
        reached = [True] + [False] * len(names)  # whether the levels so far take the first i names
        for level in _levels(self.pattern):
            if level is None:
                reached = list(accumulate(reached, or_))
            else:
                takes = [level.fullmatch(name) is not None for name in names]
                reached = [False, *map(and_, reached, takes)]
        return reached[-1]

    @property
    def ref(self) -> RuleRef:
        return RuleRef(self.pattern, str(self.style.name))

    def __str__(self) -> str:
        return str(self.ref)


@dataclass(frozen=True, slots=True)
class Plan:
    """A named set of rules and the engine that carries them out. Equal by value; hashable."""

    name: str
    rules: tuple[Rule, ...]
    engine: Engine = Engine.NATIVE
    reduce_scatter: ReduceScatter = ReduceScatter.AUTO

    def __post_init__(self) -> None:
        if not self.name:
            raise PlanError("a plan needs a name.")
        if not self.rules:
            raise PlanError(
                f'plan "{self.name}" has no rules. Write at least one: "MODULE.PATTERN" = "STYLE".'
            )
        patterns = [rule.pattern for rule in self.rules]
        for pattern in patterns:
            if patterns.count(pattern) > 1:
                raise PlanError(f'plan "{self.name}" has two rules "{pattern}". Keep one.')

    @classmethod
    def from_toml(cls, text: str, source: str = "plan") -> Self:
        """Reads a plan file's text. Raises PlanError, which names `source` and the line or rule."""
        with _inside(source):
            try:
                table = tomllib.loads(text)
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                raise PlanError(f"not valid TOML: {error}.") from None
            known = ("engine", "name", "reduce_scatter", "rules")
            for key in table:
                if key not in known:
                    raise PlanError(f'unknown key "{key}". Allowed: {", ".join(known)}.')
            rules, name = table.get("rules"), table.get("name", source)
            if not isinstance(rules, dict):
                raise PlanError('no [rules] table. Write [rules] and then "MODULE.PATTERN" = "STYLE" lines.')
            if not isinstance(name, str):
                raise PlanError(f"name is {name!r:.40}. Write it in quotes.")
            engine = _choice(Engine, table.get("engine", Engine.NATIVE), "engine")
            scatter = _choice(
                ReduceScatter, table.get("reduce_scatter", ReduceScatter.AUTO), "reduce_scatter"
            )
            return cls(name, tuple(_rule(*item) for item in rules.items()), engine, scatter)

    def to_toml(self, comments: Mapping[str, str] | None = None) -> str:
        """The plan as a file's text: from_toml(to_toml()) is the same plan. comments: what stands above a
        rule, by its pattern."""
        lines = [f"name = {quote(self.name)}", f'engine = "{self.engine}"']
        if self.reduce_scatter is not ReduceScatter.AUTO:
            lines.append(f'reduce_scatter = "{self.reduce_scatter}"')
        lines.append("[rules]")
        for rule in self.rules:
            lines += comment((comments or {}).get(rule.pattern, ""))
            lines.append(f"{quote(rule.pattern)} = {toml(rule.style.to_value())}")
        return "\n".join(lines) + "\n"

    def rule_for(self, module: str) -> Rule | None:
        """The rule that holds for a module: the last that matches."""
        return next((rule for rule in reversed(self.rules) if rule.matches(module)), None)


AnyPlan = Plan | TheirPlan
"""What a command can be given as a plan."""


def suggest_pattern(pattern: str, modules: Iterable[str]) -> str | None:
    """The module pattern nearest to a mistyped one, layer numbers as `*`; None if nothing is near."""
    candidates = sorted({any_layer(name) for name in modules if name})
    near = difflib.get_close_matches(any_layer(pattern), candidates, n=1, cutoff=0.5)
    return near[0] if near else None


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""


@lru_cache(maxsize=1024)
def _levels(pattern: str) -> tuple[re.Pattern[str] | None, ...]:
    """A pattern's levels, None for `**`. One expression for all would backtrack for ever on some."""
    return tuple(
        None if level == "**" else re.compile(re.sub(r"(?:\\\*)+", ".*", re.escape(level)))
        for level in pattern.split(".")
    )


@contextmanager
def _inside(where: str) -> Iterator[None]:
    """A PlanError from inside says where it was."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _rule(pattern: str, value: object) -> Rule:
    with _inside(f'rule "{pattern}"'):
        return Rule(pattern, Style.from_value(value))


def _choice(kind: type[E], value: object, what: str) -> E:
    try:
        return kind(str(value)) if value is not None else kind("")
    except ValueError:
        allowed = [str(member) for member in kind]
        shown = f'"{value}"' if value is not None else "missing"
        hint = suggest(str(value), allowed)
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
