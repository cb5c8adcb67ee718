"""Python, written: calls, dicts and names laid out as `ruff format` lays them out, and the imports that they
need. Names come from plans and models: only dotted identifiers enter code, all other text as a literal."""

import ast
import json
import keyword
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardwise.core.errors import PlanError
from shardwise.core.shown import shown

WIDTH = 88
"""Of a line, as ruff and black have it by default."""
_INDENT = "    "
_FROM = {
    "torch": ("Tensor", "nn"),
    "torch.func": ("functional_call",),
    "torch.distributed.device_mesh": ("DeviceMesh", "init_device_mesh"),
    "torch.distributed.fsdp": ("FSDPModule", "MixedPrecisionPolicy", "fully_shard"),
    "torch.distributed.tensor": ("DTensor", "Partial", "Replicate", "Shard", "distribute_module"),
    "torch.distributed.tensor.parallel": (
        "ColwiseParallel",
        "ParallelStyle",
        "PrepareModuleInput",
        "PrepareModuleInputOutput",
        "RowwiseParallel",
        "SequenceParallel",
        "loss_parallel",
        "parallelize_module",
    ),
    "torch.utils.checkpoint": ("CheckpointPolicy", "checkpoint", "create_selective_checkpoint_contexts"),
    "transformers": ("AutoConfig", "AutoModelForCausalLM"),
    "transformers.distributed": ("DistributedConfig",),
}
_MODULES = {"dist": "import torch.distributed as dist", "F": "import torch.nn.functional as F"}
_STANDARD = {
    "functools": ("partial",),
    "contextlib": ("contextmanager", "nullcontext"),
    "itertools": ("count",),
}


@dataclass(frozen=True, slots=True)
class Raw:
    """Code as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """name(value, key=value). named: those by keyword."""

    name: str
    values: tuple["Code", ...] = ()
    named: tuple[tuple[str, "Code"], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """(value, value), or [value, value]."""

    values: tuple["Code", ...]
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """{"key": value}. comments: above a key, a line each. is_open: each key on a line of its own, also where
    all would fit in one."""

    items: tuple[tuple[str, "Code"], ...]
    comments: tuple[tuple[str, str], ...] = ()
    is_open: bool = False


Code = Raw | Call | Row | Table


def call(name: str, *values: Code, **named: Code | None) -> Call:
    """A Call; keywords that are None are left out."""
    given = tuple((key, value) for key, value in named.items() if value is not None)
    return Call(name, values, given)


def text(value: str) -> str:
    """A literal of any text, as ruff writes it."""
    plain = value.isprintable() and value.isascii()
    return json.dumps(value) if plain else _double(repr(value))


def _double(literal: str) -> str:
    return literal if '"' in literal else f'"{literal[1:-1]}"'


def value_of(value: object) -> Code:
    """Plain data as code. Raises PlanError for any other."""
    match value:
        case str():
            return Raw(text(value))
        case bool() | int() | float() | None:
            if isinstance(value, float) and value in (float("inf"), -float("inf")):
                return Raw(f'float("{value}")')
            return Raw(repr(value))
        case dict():
            return Table(tuple((str(key), value_of(each)) for key, each in value.items()))
        case list() | tuple():
            return Row(tuple(value_of(each) for each in value), isinstance(value, list))
        case _:
            raise PlanError(f"a value of type {type(value).__name__} can't be written as code.")


def checked_name(name: str) -> str:
    """A module's or parameter's dotted name, which may have numbers and `*` for layers. Raises PlanError for
    any other text."""
    parts = name.split(".")
    if len(name) > 500 or not all(
        part == "*" or part.isdecimal() or (part.isidentifier() and part.isascii()) for part in parts
    ):
        raise PlanError(
            f'"{shown(name)}" is no dotted name of a module, which is all that enters code. Rename it.'
        )
    return name


def attribute(root: str, name: str) -> str:
    """`model.layers` of a module's name, or get_submodule() where attributes can't say it."""
    checked_name(name)
    if not name:
        return root
    if all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        return f"{root}.{name}"
    return f"{root}.get_submodule({text(name)})"


def dotted(name: str) -> str:
    """A module's path to import. Raises PlanError for any other text."""
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        raise PlanError(f'"{shown(name)}" is no dotted name, which is all that enters code.')
    return name


def written(code: Code, column: int = 0, indent: int = 0, tail: int = 0) -> str:
    """The code in one line where it fits, else over several. column: where its first line begins; indent: of
    the line, in steps; tail: characters that follow its last line."""
    line = _line(code)
    must_open = isinstance(code, Table) and bool(code.items) and (code.is_open or bool(code.comments))
    if not must_open and "\n" not in line and column + len(line) + tail <= WIDTH:
        return line
    inner, outer = _INDENT * (indent + 1), _INDENT * indent
    match code:
        case Raw(raw):
            return raw
        case Call(name, values, named):
            if not (values or named):
                return line
            given = [("", value) for value in values] + [(f"{key}=", value) for key, value in named]
            return _opened(f"{name}(", ")", given, inner, outer, indent)
        case Row(values, is_list):
            begin, end = ("[", "]") if is_list else ("(", ")")
            return _opened(begin, end, [("", value) for value in values], inner, outer, indent)
        case Table(items, comments):
            said = dict(comments)
            given = [(_comment(said.get(key), inner) + f"{text(key)}: ", value) for key, value in items]
            return _opened("{", "}", given, inner, outer, indent)


def _comment(said: str | None, inner: str) -> str:
    return f"# {comment(said)}\n{inner}" if said else ""


def _opened(
    begin: str, end: str, given: Sequence[tuple[str, Code]], inner: str, outer: str, indent: int
) -> str:
    lines = []
    for lead, value in given:
        column = len(inner) + len(lead.rpartition("\n")[2].strip()) + lead.endswith(" ")
        lines.append(f"{inner}{lead}{written(value, column, indent + 1, 1)},\n")
    return f"{begin}\n{''.join(lines)}{outer}{end}"


def _line(code: Code) -> str:
    match code:
        case Raw(raw):
            return raw
        case Call(name, values, named):
            given = [_line(value) for value in values] + [f"{key}={_line(value)}" for key, value in named]
            return f"{name}({', '.join(given)})"
        case Row(values, is_list):
            inside = ", ".join(map(_line, values))
            if is_list:
                return f"[{inside}]"
            return f"({inside},)" if len(values) == 1 else f"({inside})"
        case Table(items):
            return "{" + ", ".join(f"{text(key)}: {_line(value)}" for key, value in items) + "}"


def statement(lead: str, code: Code, indent: int = 0) -> str:
    """`lead` and the code, from the line's indent on, with a newline."""
    before = _INDENT * indent + lead
    return f"{before}{written(code, len(before), indent)}\n"


def comment(said: str) -> str:
    """Text of one line, as a comment has it: control characters are escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in said)


def file(head: Iterable[str], doc: str, body: str, more: Mapping[str, Sequence[str]] | None = None) -> str:
    """A whole file: comments at its head, its docstring (text of ours), the imports that the body needs, the
    body. more: names of other modules that the body uses, by module."""
    lines = "".join(f"# {comment(line)}\n" if line else "#\n" for line in head)
    return f'{lines}"""{doc}"""\n\n{_imports(body, more or {})}{body}'


def _imports(body: str, more: Mapping[str, Sequence[str]]) -> str:
    words = {each.id for each in ast.walk(ast.parse(body)) if isinstance(each, ast.Name)}
    plain = ["import torch"] if "torch" in words else []
    plain += [line for name, line in _MODULES.items() if name in words]
    standard = [_from(module, words & set(names)) for module, names in sorted(_STANDARD.items())]
    others = {**_FROM, **more}
    third = [_from(module, words & set(names)) for module, names in sorted(others.items())]
    sections = ["".join(standard), "".join(f"{line}\n" for line in sorted(plain)) + "".join(third)]
    return "\n".join(section for section in sections if section)


def _from(module: str, names: set[str]) -> str:
    if not names:
        return ""
    # as isort has it: CONSTANTS, then Classes, then functions
    ordered = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {module} import {', '.join(ordered)}\n"
    if len(line) <= WIDTH + 1:
        return line
    inside = "".join(f"{_INDENT}{name},\n" for name in ordered)
    return f"from {module} import (\n{inside})\n"
