"""Which values of a case are paths, and the same path from another folder.

A value may be known by a name instead: a plan or a machine that comes with Shardwise (another's file ends in
.toml), a model's type (a path of one has a slash, or ends in .json). In a case file a relative path is taken
from the file's folder, else from the working folder.
"""

import os
from dataclasses import replace
from pathlib import Path

from shardwise.core.case import SHARED, Case, TextSource
from shardwise.core.option import Asked, Paths

HUGGING_FACE = "hf:"


def split(asked: Asked, value: str) -> tuple[str, str, str] | None:
    """What stands before a value's path, the path, and what stands behind it; None for what is no path."""
    if asked.option.paths is Paths.ALL:
        return "", value, ""
    if asked.option.paths is Paths.TOML and value.endswith(".toml"):
        return "", value, ""
    if asked.option.paths is Paths.CONFIG and value.startswith(HUGGING_FACE):
        path, mark, behind = value.removeprefix(HUGGING_FACE).partition("?")
        return (HUGGING_FACE, path, mark + behind) if is_config(path) else None
    return None


def is_config(target: str) -> bool:
    """Whether what stands behind hf: is a path, and not a type."""
    return "/" in target or "\\" in target or target.endswith(".json") or target in (".", "..")


def from_file(asked: Asked, value: str, folder: Path) -> str:
    """A value of a case file in `folder`, for the working folder."""
    parts = split(asked, value)
    if parts is None or not parts[1] or not _exists(folder / parts[1]):
        return value
    return _joined(parts[0], str(folder / parts[1]), parts[2])


def for_file(asked: Asked, value: str, folder: Path) -> str:
    """A value as it stands in a case file in `folder`: a relative path that leads somewhere, from there."""
    parts = split(asked, value)
    if parts is None or os.path.isabs(parts[1]) or not _exists(Path(parts[1])):
        return value
    path = os.path.relpath(os.path.realpath(parts[1]), os.path.realpath(folder))
    return _joined(parts[0], path, parts[2])


def case_for_file(case: Case, folder: Path | None) -> Case:
    """With all its paths so; as it is where nobody says where the file will lie."""
    if folder is None:
        return case
    by_field = {asked.field: asked for asked in SHARED}

    def one(field: str, value: str | None) -> str | None:
        return for_file(by_field[field], value, folder) if value is not None else None

    def many(field: str, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(for_file(by_field[field], each, folder) for each in values)

    text: TextSource = replace(
        case.text, files=many("files", case.text.files), tokenizer=one("tokenizer", case.text.tokenizer)
    )
    model = for_file(by_field["model"], case.model, folder)
    machine = one("machine", case.machine)
    return replace(case, model=model, plans=many("plans", case.plans), machine=machine, text=text)


def _joined(before: str, path: str, behind: str) -> str:
    named = path if before != HUGGING_FACE or is_config(path) else f"./{path}"
    return f"{before}{named}{behind}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False
