"""`shardwise models`: what can be named as a model."""

from typing import Annotated

import typer

from shardwise.cli.output import write_json
from shardwise.report.common.streams import Console

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def models(json: Json = False) -> None:
    """List the models: shapes and exact parameter counts.

    [dim]shardwise models[/]
    [dim]shardwise models --json[/]
    """
    from shardwise.models.source import NAMINGS
    from shardwise.models.specs import SPECS

    if json:
        rows = [
            {"name": s.name, "parameters": s.config.n_parameters, "config": s.config, "about": s.about}
            for s in SPECS.values()
        ]
        namings = [{"form": form, "about": about} for form, about in NAMINGS]
        write_json({"schema_version": 1, "models": rows, "namings": namings})
        return
    from shardwise.report.common.formats.terminal import drawn
    from shardwise.report.lists.tables import models_table, named_table

    sizes = (
        (spec.name, c.n_parameters, c.n_layers, c.hidden, f"{c.n_heads}/{c.n_kv_heads}", c.vocab_size)
        for spec in SPECS.values()
        for c in (spec.config,)
    )
    console = Console()
    for table in (models_table(sizes), named_table(NAMINGS, "also", "also")):
        console.print(drawn(table, console.width), "")
