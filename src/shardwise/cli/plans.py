"""`shardwise plans`: the built-in plans, or one of them as TOML."""

from typing import Annotated

import typer

from shardwise.cli.models import Json
from shardwise.cli.output import write_json
from shardwise.core.errors import ModelError
from shardwise.core.plan import Family
from shardwise.core.shown import shown
from shardwise.parallel.builtin import ABOUT, builtin_plan
from shardwise.report.common.streams import Console, write_out


def plans(
    name: Annotated[
        str | None, typer.Argument(help="Print this plan as a TOML file, to start your own from.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For this model of `shardwise models`.", show_default="a Llama")
    ] = None,
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Activations cut along the sequence between blocks.",
            metavar="",
            rich_help_panel="Built-in plans",
        ),
    ] = True,
    json: Json = False,
) -> None:
    """List the built-in plans, or print one as TOML.

    [dim]shardwise plans rowwise > mine.toml[/]
    [dim]shardwise plans colwise --model gpt3-175b > mine.toml[/]
    """
    if name is not None:
        plan = builtin_plan(name, sequence_parallel=sequence_parallel, family=_family(model))
        write_out(plan.to_toml().encode())
    elif json:
        write_json(
            {"schema_version": 1, "plans": [{"name": plan, "about": about} for plan, about in ABOUT.items()]}
        )
    else:
        from shardwise.report.common.formats.terminal import drawn
        from shardwise.report.lists.tables import named_table

        console = Console()
        console.print(drawn(named_table(ABOUT.items(), "plan", "plans"), console.width))


def _family(model: str | None) -> Family:
    if model is None:
        return Family.LLAMA
    from shardwise.models.specs import SPECS, get_spec

    if ":" in model:  # hf:TYPE, hf:PATH or package.module:factory
        raise ModelError(
            f'model "{shown(model)}": the built-in plans are for {", ".join(SPECS)}. For yours: '
            f"shardwise plan --model {shown(model)} --toml."
        )
    return get_spec(model).family
