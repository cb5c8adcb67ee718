"""`shardwise machines`: the machines that predict knows, or one of them as TOML."""

from typing import Annotated

import typer

from shardwise.cli.models import Json
from shardwise.cli.output import write_json
from shardwise.report.common.streams import Console, write_out


def machines(
    show: Annotated[
        str | None,
        typer.Option(help="Print this machine as a TOML file, to start your own from.", show_default="none"),
    ] = None,
    json: Json = False,
) -> None:
    """List the machines that predict knows, or print one as TOML: every constant with its unit and source.

    [dim]shardwise machines --show h100-sxm-80gb > mine.toml[/]
    """
    from shardwise.predict.machines import load_machine, machine_names, machine_text
    from shardwise.report.common.formats.terminal import drawn
    from shardwise.report.lists.tables import machines_table

    if show is not None:
        write_out(machine_text(show).encode())
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
                "error": machine.error,
            }
            for machine, peak in zip(found, peaks, strict=True)
        ]
        write_json({"schema_version": 1, "machines": rows})
        return
    console = Console()
    console.print(drawn(machines_table(list(zip(found, peaks, strict=True))), console.width))
