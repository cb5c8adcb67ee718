"""The command `shardwise`: puts the commands together, and turns errors into one line and an exit code.

0 fine; 1 the answer is "no"; 2 the user's input is wrong; 3 a rank died or the run could not go on; 4 train
was asked to stop, and has saved; 130 Ctrl-C."""

import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import shardwise.cli
from shardwise import __version__
from shardwise.cli.output import speaks
from shardwise.core.errors import InputError, ShardwiseError
from shardwise.launch import leave
from shardwise.report.common.streams import write_error
from shardwise.workers.garbage import collect_rarely

if TYPE_CHECKING:
    from shardwise.cli.asked import Command

VERBS = ("search", "plan", "compare", "explain", "verify", "diff", "predict", "train", "export", "calibrate")
_CTRL_C = 128 + signal.SIGINT

app = typer.Typer(
    name="shardwise",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="How to shard a PyTorch model over devices, and the proof.",
    epilog="Start with: shardwise compare rowwise colwise routed",
)


@cache
def commands() -> dict[str, Callable[..., Any]]:
    """Every module beside this one that holds a function of its own name: the verbs in the order of a
    reader's questions, then the others."""
    names = [module.name for module in pkgutil.iter_modules(shardwise.cli.__path__)]
    names.sort(key=lambda name: (VERBS.index(name) if name in VERBS else len(VERBS), name))
    modules = {name: importlib.import_module(f"shardwise.cli.{name}") for name in names if name != "main"}
    return {name: getattr(module, name) for name, module in modules.items() if hasattr(module, name)}


def verbs() -> dict[str, "Command"]:
    """What each command that is made of nouns asks for."""
    return {name: made.command for name, made in commands().items() if hasattr(made, "command")}


for _name, _made in commands().items():
    app.command(_name)(_made)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardwise {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(args: list[str] | None = None) -> NoReturn:
    """The installed command."""
    collect_rarely()
    code = _run(args)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        leave.at_once(code)
    sys.exit(code)


def _run(args: list[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        code = int(command.main(args, prog_name="shardwise", standalone_mode=False) or 0)
    except ShardwiseError as error:
        if not isinstance(error, InputError) or speaks():
            _say(str(error))
        return error.exit_code
    except typer.TyperException as error:
        message = error.format_message()
        if not message:  # no arguments at all: the help has been shown
            return error.exit_code
        if speaks():
            end = "" if message.endswith((".", "?")) else "."
            path = getattr(getattr(error, "ctx", None), "command_path", "shardwise")
            _say(f"{' '.join(message.split())}{end} Try: {path} --help.")
        return error.exit_code
    if code == _CTRL_C:  # typer has caught it
        _say("stopped by Ctrl-C; no rank was left behind.")
    return code


def _say(message: str) -> None:
    write_error(f"shardwise: {message}")
