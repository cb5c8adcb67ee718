"""`--config FILE`: a command's options as TOML. What is given on the command line wins."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from shardwise.core.errors import OptionError
from shardwise.core.plan import suggest


def read_config(context: typer.Context, value: str | None) -> str | None:
    """Eager callback of --config: makes the file's values the options' defaults."""
    if value is None:
        return None
    name, text = _find(value)
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"--config {name}: not valid TOML: {error}.") from None
    known = {_option_name(parameter): str(parameter.name) for parameter in context.command.params}
    for no_key in ("config", "help"):
        known.pop(no_key, None)
    defaults = {}
    for key, given in table.items():
        option = key.replace("-", "_")
        if option not in known:
            raise OptionError(
                f'--config {name}: unknown key "{key}".{suggest(option, known)} Allowed: {", ".join(sorted(known))}.'
            )
        if isinstance(given, dict):
            raise OptionError(f"--config {name}: {key} is a table. Write a plain value.")
        defaults[known[option]] = [str(item) for item in given] if isinstance(given, list) else given
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _option_name(parameter: Any) -> str:
    """`--random-ids` -> random_ids; an argument by its name."""
    option = str(parameter.opts[0])
    return option.removeprefix("--").replace("-", "_") if option.startswith("--") else str(parameter.name)


def shipped_configs() -> list[str]:
    """Names of the configs that come with Shardwise."""
    folder = resources.files("shardwise.cli") / "configs"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def _find(value: str) -> tuple[str, str]:
    """(what to call it, text) of a file, or of a shipped config by name."""
    path = Path(value)
    shipped = shipped_configs()
    if not path.exists() and value.removesuffix(".toml") in shipped:
        name = value.removesuffix(".toml")
        return name, (resources.files("shardwise.cli") / "configs" / f"{name}.toml").read_text()
    try:
        return value, path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--config {value}: {error.strerror}. Give a TOML file, or one of those shipped: {', '.join(shipped)}."
        ) from None
    except UnicodeDecodeError:
        raise OptionError(f"--config {value}: not UTF-8 text. Give a TOML file.") from None
