"""Values and comments as TOML's text, each on one line. Reading is tomllib's."""

import json
import re
from collections.abc import Mapping

TomlValue = str | bool | list[str] | dict[str, str]


def toml(value: str | bool | list[str] | Mapping[str, TomlValue]) -> str:
    """A value on one line: `{ style = "colwise", pieces = "6+2" }`. Keys that TOML takes as they are stay
    bare."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return quote(value)
        case list():
            return "[" + ", ".join(map(quote, value)) + "]"
        case _:
            pairs = (f"{_key(key)} = {toml(inner)}" for key, inner in value.items())
            return "{ " + ", ".join(pairs) + " }"


def comment(text: str) -> list[str]:
    """A comment's lines, without the signs that TOML has not in comments."""
    lines = (
        "".join(" " if ord(sign) < 32 or sign == "\x7f" else sign for sign in line)
        for line in text.splitlines()
    )
    return [f"# {line}".rstrip() for line in lines]


def quote(text: str) -> str:
    """A TOML basic string: JSON's, but for surrogate pairs, which TOML hasn't, and DEL, which it wants
    escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else quote(name)
