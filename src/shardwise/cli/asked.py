"""A command from nouns: typer's options are made of the Case's fields and of a verb's own, read back into
both."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import typer

from shardwise.cli.config import read_config
from shardwise.cli.output import JSON, OUTPUT, TERMINAL, Output, speaks
from shardwise.core.case import SHARED, Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.option import Asked, options_of
from shardwise.files.run_folder import check_free
from shardwise.report.common.formats import formats

Own = TypeVar("Own")
CONFIG = "A case file (see shardwise case), or the name of a shipped one (llama3_8b_tp8)."
AS_JSON = "One JSON document on stdout, nothing else."
FORMAT = f"How the answer is written to stdout: {', '.join(formats())}."
ALL = tuple(asked.key for asked in SHARED)
RUN = tuple(key for key in ALL if key not in ("machine", "expert_load", "documents"))
TRACED = tuple(key for key in ALL if key not in ("machine", "learning_rate", "max_norm", "documents"))
STEP = (
    "plans",
    "model",
    "mesh",
    "machine",
    "sequence_parallel",
    "batch",
    "seq",
    "dtype",
    "param_dtype",
    "reduce_dtype",
    "accumulation",
    "reshard_after_forward",
    "reduce_once",
    "recompute",
)
"""What a step is decided by, whether it is predicted or written for a framework."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A default that a verb works out, in words."""

    words: str


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Of a verb that knows nothing but the case."""


@dataclass(frozen=True, slots=True)
class Call(Generic[Own]):
    """One call of a command. given: the keys that came from the command line or a case file; typed: from the
    command line. config: the case file, as it was named."""

    case: Case
    own: Own
    output: Output
    given: frozenset[str]
    typed: frozenset[str] = frozenset()
    config: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """What a command takes. shared: keys of the Case; options: the noun of its own ones. defaults, about,
    panels: where they
    differ from the nouns'. out: what --out is for; "": there is none. one_plan: of
    several, such as a case file has, the first is taken. prepare: changes the values before nouns are
    made of them.
    check_out: raises OptionError for a folder that can't be --out, before anything runs; it gets the other
    options' values too."""

    options: type = NoOptions
    shared: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    panels: Mapping[str, str] = field(default_factory=dict)
    out: str = ""
    out_shown: str = "none"
    has_json: bool = True
    one_plan: bool = False
    prepare: Callable[[dict[str, Any]], None] = lambda values: None
    check_out: Callable[[Path, Mapping[str, Any]], None] = lambda out, values: check_free(out)

    def asked(self) -> list[Asked]:
        """All that it asks for: arguments, then what is shared, then its own."""
        own = options_of(self.options)
        names = {asked.key for asked in own}
        shared = [asked for asked in SHARED if asked.key in self.shared and asked.key not in names]
        return sorted([*shared, *own], key=lambda asked: not asked.option.is_argument)

    def own_keys(self) -> tuple[str, ...]:
        """What only this verb knows; a shared key that it asks for in its own way is shared all the same."""
        return tuple(asked.key for asked in options_of(self.options) if asked.key not in self.shared)

    def parameters(self) -> list[inspect.Parameter]:
        made = [self._parameter(asked) for asked in self.asked()]
        arguments = sum(asked.option.is_argument for asked in self.asked())
        config = typer.Option(help=CONFIG, callback=read_config, is_eager=True)
        made.insert(arguments, _keyword("config", Annotated[str | None, config], None))
        if self.has_json:
            as_json = typer.Option("--json", help=AS_JSON, rich_help_panel=OUTPUT)
            made.append(_keyword("as_json", Annotated[bool, as_json], False))
            form = typer.Option("--format", help=FORMAT, rich_help_panel=OUTPUT)
            made.append(_keyword("form", Annotated[str, form], TERMINAL))
        if self.out:
            out = typer.Option(help=self.out, show_default=self.out_shown, rich_help_panel=OUTPUT)
            made.append(_keyword("out", Annotated[Path | None, out], None))
        return [_keyword("typer_context", typer.Context), *made]

    def _parameter(self, asked: Asked) -> inspect.Parameter:
        option = asked.option
        default = self.defaults.get(asked.key, asked.default)
        shown = default.words if isinstance(default, Shown) else option.shown
        is_many = asked.is_many and not (self.one_plan and asked.key == "plans")
        kind: Any = list[str] if is_many else str if asked.is_many or asked.kind is Mesh else asked.kind
        is_required = option.is_argument and default is None and not asked.is_optional
        is_worked_out = isinstance(default, Shown) or bool(option.shown)
        is_unset = not is_required and (is_worked_out or default in (None, ()))
        if is_unset or (option.least is not None and default < option.least):
            kind, default = kind | None, None
        about: dict[str, Any] = {"help": self.about.get(asked.key, option.about)}
        if shown:
            about["show_default"] = shown
        if option.is_argument:
            default = inspect.Parameter.empty if is_required else default
            return _keyword(asked.key, Annotated[kind, typer.Argument(**about)], default)
        if kind is bool:
            about["metavar"] = ""  # "<bool>" beside a flag tells nothing, and cuts the names beside it
        panel = self.panels.get(asked.key, option.panel)
        about |= {
            "min": option.least,
            "max": option.most,
            "rich_help_panel": panel,
            "hidden": option.is_hidden,
        }
        made = typer.Option(asked.flag, **about)
        return _keyword(asked.key, Annotated[kind, made], default)

    def call(self, context: typer.Context, values: dict[str, Any]) -> Call[Any]:
        form = values.pop("form", TERMINAL)
        output = Output(_form(form, values.pop("as_json", False)), values.pop("out") if self.out else None)
        if output.out is not None and speaks():  # of torchrun's ranks one makes the folder
            self.check_out(output.out, values)
        config = values.pop("config")
        given = frozenset(key for key in values if _is_given(context, key))
        typed = frozenset(key for key in given if _is_typed(context, key))
        self.prepare(values)
        own = {}
        for asked in options_of(self.options):
            value = values.pop(asked.key)
            if value is not None:
                own[asked.field] = tuple(value) if isinstance(value, list) else value
        own |= {key: values.pop(key) for key in set(values) - set(ALL)}
        return Call(self._case(values), self.options(**own), output, given, typed, config)

    def _case(self, values: dict[str, Any]) -> Case:
        given = {key: value for key, value in values.items() if value is not None}
        return Case.of(**{"model": "llama3-debug", "mesh": "tp=1", **given})


def command(what: Command) -> Callable[[Callable[[Call[Any]], int]], Callable[..., int]]:
    """Makes a command of a function of a Call; its docstring is the help."""

    def decorate(body: Callable[[Call[Any]], int]) -> Callable[..., int]:
        def run(typer_context: typer.Context, **values: Any) -> int:
            return body(what.call(typer_context, values))

        run.__doc__, run.__name__, run.__module__ = _unwrapped(body), body.__name__, body.__module__
        run.__signature__ = inspect.Signature(what.parameters())  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in what.parameters()}
        run.command = what  # type: ignore[attr-defined]
        return run

    return decorate


def _unwrapped(body: Callable[..., Any]) -> str:
    """The docstring with each paragraph in one line, for the terminal to wrap; the examples keep theirs."""
    paragraphs = (inspect.getdoc(body) or "").split("\n\n")
    return "\n\n".join(each if each.startswith("[dim]") else " ".join(each.split()) for each in paragraphs)


def _form(form: str, as_json: bool) -> str:
    """Raises OptionError for a format that there isn't, before anything runs."""
    if form == TERMINAL:
        return JSON if as_json else form
    from shardwise.report.common.deliver import check_format

    check_format(form)
    if as_json and form != JSON:
        raise OptionError(f"--json and --format {form} don't go together. Leave one out.")
    return form


def refuse(given: Iterable[str], keys: Iterable[str], why: str) -> None:
    """Raises OptionError for one of these keys that the user gave."""
    for key in keys:
        if key in given:
            flags = {asked.key: asked.key for asked in SHARED if asked.option.is_argument}
            raise OptionError(f"{flags.get(key, '--' + key.replace('_', '-'))}: {why}.")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT" and bool(context.params.get(name))


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
