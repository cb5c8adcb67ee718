"""Plan: a named set of rules (pattern of module names -> style), as data. TOML text in and out; no files are
opened here.

Patterns are dotted module names; `*` stands for one level, `**` for any number of levels, `.` alone for the
model itself. Where two rules match a module, the later one holds. What a style is: style.py.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from operator import and_, or_
from typing import Self

from shardwise.core.errors import PlanError
from shardwise.core.rule import RuleRef
from shardwise.core.style import ExpertsAxis as ExpertsAxis
from shardwise.core.style import Ownership as Ownership
from shardwise.core.style import Style as Style
from shardwise.core.style import StyleName as StyleName
from shardwise.core.style import choice
from shardwise.core.style import suggest as suggest
from shardwise.core.toml_text import comment, quote, toml

ROOT = "."
"""The pattern of the model itself, for parameters of its own."""


class Engine(StrEnum):
    """Who carries a plan out."""

    NATIVE = "native"
    DTENSOR = "dtensor"


NO_ENGINE = "none"
"""Of a model that nobody cuts but FSDP."""


class TheirPlan(StrEnum):
    """What can stand in a plan's place where the rules aren't ours. unsharded: one rank holds the whole
    model. hf: a Hugging Face model's own tp_plan, carried out by transformers. hf-ep: its ep_plan above that:
    experts are shared out. own: the model came sharded from the user's factory, or from its framework."""

    UNSHARDED = "unsharded"
    HF = "hf"
    HF_EP = "hf-ep"
    OWN = "own"


class Family(StrEnum):
    """Models with the same module names, for which a built-in plan has the same rules."""

    LLAMA = "llama"
    GPT = "gpt"
    MOE = "moe"


class ReduceScatter(StrEnum):
    """How the native engine carries out a reduce-scatter.

    backend: the process group's own. pairwise: an all-to-all and a local sum, which sends (n-1)/n of the
    tensor (gloo's own sends as much as an all-reduce). auto: pairwise on gloo, backend elsewhere.
    """

    AUTO = "auto"
    BACKEND = "backend"
    PAIRWISE = "pairwise"


class ContextAttention(StrEnum):
    """How attention gets the keys and values of a sequence that ranks share (cp).

    gather: an all-gather of both in each layer, as Llama 3 was trained. ring: they go round from rank to
    rank while each computes with those that it has.
    """

    GATHER = "gather"
    RING = "ring"


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
        return _matches(self.pattern, module)

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
    context_attention: ContextAttention = ContextAttention.GATHER

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
            known = ("context_attention", "engine", "name", "reduce_scatter", "rules")
            for key in table:
                if key not in known:
                    raise PlanError(f'unknown key "{key}". Allowed: {", ".join(known)}.')
            rules, name = table.get("rules"), table.get("name", source)
            if rules is not None and not isinstance(rules, dict):
                raise PlanError(
                    f"rules is {rules!r:.40}, and not a table. Write [rules] and then "
                    '"MODULE.PATTERN" = "STYLE" lines.'
                )
            if rules is None:
                raise PlanError('no [rules] table. Write [rules] and then "MODULE.PATTERN" = "STYLE" lines.')
            if not isinstance(name, str):
                raise PlanError(f"name is {name!r:.40}. Write it in quotes.")
            engine = choice(Engine, table.get("engine", Engine.NATIVE), "engine")
            scatter = choice(ReduceScatter, table.get("reduce_scatter", ReduceScatter.AUTO), "reduce_scatter")
            given = table.get("context_attention", ContextAttention.GATHER)
            attention = choice(ContextAttention, given, "context_attention")
            return cls(name, tuple(_rule(*item) for item in rules.items()), engine, scatter, attention)

    def to_toml(self, comments: Mapping[str, str] | None = None) -> str:
        """The plan as a file's text: from_toml(to_toml()) is the same plan. comments: what stands above a
        rule, by its pattern."""
        lines = [f"name = {quote(self.name)}", f'engine = "{self.engine}"']
        if self.reduce_scatter is not ReduceScatter.AUTO:
            lines.append(f'reduce_scatter = "{self.reduce_scatter}"')
        if self.context_attention is not ContextAttention.GATHER:
            lines.append(f'context_attention = "{self.context_attention}"')
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
    levels = pattern.split(".")
    candidates = sorted({_any_layer_but(levels, name) for name in modules if name})
    near = difflib.get_close_matches(_any_layer_but(levels, pattern), candidates, n=1, cutoff=0.5)
    return near[0] if near else None


def _any_layer_but(levels: Sequence[str], name: str) -> str:
    """`blocks.*.2` for `blocks.7.2` where `block.*.2` was written: a number inside a layer stays where it was
    written."""
    made: list[str] = []
    for place, level in enumerate(name.split(".")):
        is_written = "*" in made and level in levels[place : place + 1]
        made.append("*" if level.isdecimal() and not is_written else level)
    return ".".join(made)


@lru_cache(maxsize=65536)  # a trace asks about each module of 126 layers several times over
def _matches(pattern: str, module: str) -> bool:
    names = module.split(".")
    reached = [True] + [False] * len(names)  # whether the levels so far take the first i names
    for level in _levels(pattern):
        if level is None:
            reached = list(accumulate(reached, or_))
        else:
            takes = [level.fullmatch(name) is not None for name in names]
            reached = [False, *map(and_, reached, takes)]
    return reached[-1]


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
