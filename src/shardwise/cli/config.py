"""`--config FILE`: a case file, whose values become the defaults of a command's options. The command line
wins."""

from importlib import resources
from pathlib import Path

import typer

from shardwise.core.errors import OptionError
from shardwise.core.named_path import from_file
from shardwise.files.case import read_case


def read_config(context: typer.Context, value: str | None) -> str | None:
    """Eager callback of --config: makes the file's values the options' defaults."""
    if value is None:
        return None
    from shardwise.cli.main import verbs

    known = {name: what.own_keys() for name, what in verbs().items()}
    verb = str(context.command.name)
    asked = context.command.params
    # by an option's name, and by its field's, where the option is called otherwise (--for, --as)
    parameters = {each.name: each for each in asked} | {_key(each.opts[0]): each for each in asked}
    name, text = _read(value)
    own = {"format", "json", "out", *known.get(verb, parameters)} & set(parameters)
    paths = {each.key: each for each in verbs()[verb].asked()} if verb in known else {}
    defaults = {}
    for key, given in read_case(text, f"--config {name}", verb, own, known).items():
        if key in parameters:
            is_many = parameters[key].multiple or parameters[key].nargs == -1
            items = [str(item) for item in given] if isinstance(given, list) else [given]
            if key in paths:
                items = [from_file(paths[key], str(item), Path(value).parent) for item in items]
            defaults[parameters[key].name] = items if is_many else items[0]
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _key(option: str) -> str:
    """`--random-ids` -> random_ids; an argument by its name."""
    return option.removeprefix("--").replace("-", "_")


def shipped_configs() -> list[str]:
    """Names of the configs that come with Shardwise."""
    folder = resources.files("shardwise.cli") / "configs"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def _read(value: str) -> tuple[str, str]:
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
            f"--config {value}: {error.strerror}. Give a TOML file, or one of those shipped: "
            f"{', '.join(shipped)}."
        ) from None
    except UnicodeDecodeError:
        raise OptionError(f"--config {value}: not UTF-8 text. Give a TOML file.") from None
