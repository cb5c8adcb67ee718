"""`shardwise models`, `shardwise plans` and `shardwise machines`: what the names stand for."""

import sys
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from shardwise.core.plan import Family
from shardwise.parallel.builtin import ABOUT, builtin_plan


def models(
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the models: shapes and exact parameter counts."""
    from shardwise.models.source import NAMINGS
    from shardwise.models.specs import SPECS

    if json:
        rows = [
            {"name": s.name, "parameters": s.config.n_parameters, "config": s.config, "about": s.about}
            for s in SPECS.values()
        ]
        namings = [{"form": form, "about": about} for form, about in NAMINGS]
        _print_json({"schema_version": 1, "models": rows, "namings": namings})
        return
    table = Table("model", "parameters", "layers", "hidden", "heads/KV", "vocabulary", box=None)
    for spec in SPECS.values():
        c = spec.config
        table.add_row(
            spec.name,
            f"{c.n_parameters:,}",
            str(c.n_layers),
            str(c.hidden),
            f"{c.n_heads}/{c.n_kv_heads}",
            f"{c.vocab_size:,}",
        )
    (changed, *not_ours) = NAMINGS
    also, others = Table("also", "", box=None), Table("for explain and verify, also", "", box=None)
    also.add_row(*changed)
    for form, about in not_ours:
        others.add_row(form, about)
    Console().print(table, "", also, "", others, sep="\n")


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
        ),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the built-in plans, or print one as TOML.

    [dim]shardwise plans rowwise > mine.toml[/]
    [dim]shardwise plans colwise --model gpt3-175b > mine.toml[/]
    """
    if name is not None:
        typer.echo(
            builtin_plan(name, sequence_parallel=sequence_parallel, family=_family(model)).to_toml(), nl=False
        )
    elif json:
        _print_json(
            {"schema_version": 1, "plans": [{"name": plan, "about": about} for plan, about in ABOUT.items()]}
        )
    else:
        table = Table("plan", "about", box=None)
        for plan, about in ABOUT.items():
            table.add_row(plan, about)
        Console().print(table)


def machines(
    show: Annotated[
        str | None,
        typer.Option(help="Print this machine as a TOML file, to start your own from.", show_default="none"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the machines that predict knows, or print one as TOML: every constant with its unit and source.

    [dim]shardwise machines --show h100-sxm-80gb > mine.toml[/]
    """
    from shardwise.predict.machines import load_machine, machine_names, machine_text

    if show is not None:
        typer.echo(machine_text(show), nl=False)
        return
    found = [load_machine(name) for name in machine_names()]
    peaks = [
        rate.peak_flops if (rate := machine.matmul("bfloat16")) is not None else None for machine in found
    ]
    if json:
        rows = [
            {
                "name": machine.name,
                "about": machine.about,
                "device": machine.device,
                "devices_per_node": machine.devices_per_node,
                "bfloat16_peak_flops": peak,
                "memory_bytes": machine.memory_bytes,
                "memory_bytes_per_s": machine.memory_bytes_per_s,
            }
            for machine, peak in zip(found, peaks, strict=True)
        ]
        _print_json({"schema_version": 1, "machines": rows})
        return
    table = Table(Column("machine", no_wrap=True), Column("devices\nper node", justify="right"), Column("bfloat16 peak\nTFLOP/s", justify="right"),
                  Column("memory\nGB", justify="right"), Column("TB/s", justify="right"), "about", box=None)  # fmt: skip
    for machine, peak in zip(found, peaks, strict=True):
        tera = "–" if peak is None else f"{peak / 1e12:,.0f}"
        table.add_row(
            machine.name, str(machine.devices_per_node), tera, f"{machine.memory_bytes / 1e9:g}", f"{machine.memory_bytes_per_s / 1e12:.2f}",
            machine.about,
        )  # fmt: skip
    Console().print(table)


def _family(model: str | None) -> Family:
    if model is None:
        return Family.LLAMA
    from shardwise.models.specs import get_spec

    return get_spec(model).family


def _print_json(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
