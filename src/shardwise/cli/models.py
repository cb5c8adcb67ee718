"""`shardwise models`: what can be named as a model."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shardwise.cli.output import write_json

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def models(json: Json = False) -> None:
    """List the models: shapes and exact parameter counts."""
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
    table = Table("model", "parameters", "layers", "hidden", "heads/KV", "vocabulary", box=None)
    for spec in SPECS.values():
        c = spec.config
        sizes = (c.n_parameters, c.n_layers, c.hidden, f"{c.n_heads}/{c.n_kv_heads}", c.vocab_size)
        table.add_row(spec.name, *(size if isinstance(size, str) else f"{size:,}" for size in sizes))
    (changed, *not_ours) = NAMINGS
    also, others = Table("also", "", box=None), Table("for explain and verify, also", "", box=None)
    also.add_row(*changed)
    for form, about in not_ours:
        others.add_row(form, about)
    Console().print(table, "", also, "", others, sep="\n")
