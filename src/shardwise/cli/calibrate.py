"""`shardwise calibrate`: measures this machine's kernels, launches and collectives; writes a machine file for
predict."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from shardwise.cli.asked import Call, Command, command
from shardwise.cli.output import JSON, OUTPUT, write_json
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError, RunError
from shardwise.core.option import Option
from shardwise.core.sample import Calibration
from shardwise.core.shown import shown
from shardwise.verbs.calibrate import WHAT, CalibrateOptions
from shardwise.verbs.calibrate import calibrate as measure


@dataclass(frozen=True, slots=True)
class _Asked(CalibrateOptions):
    out: Annotated[Path, Option("The machine file to write.", OUTPUT)] = Path("machine.toml")
    samples: Annotated[
        Path | None, Option("Also write everything that was timed, as JSON.", OUTPUT, shown="none")
    ] = None


@command(
    Command(
        _Asked,
        shared=("device",),
        about={"device": "auto, cpu or cuda; auto takes GPUs where there are any."},
        panels={"device": WHAT},
    )
)
def calibrate(call: Call[_Asked]) -> int:
    """Measure this machine, and write a machine file that predict can use.

    Kernels by type and size, what the host takes to issue an op, fresh memory, and collectives by kind, size
    and group, through the functions that training steps use; on a CPU while all ranks work at once, as they
    do in a step. It takes minutes.

    [dim]shardwise calibrate --ranks 2 --out laptop.toml[/]
    [dim]shardwise calibrate --device cuda --name "my H100s" --out h100.toml --samples h100.json[/]
    [dim]shardwise calibrate --device cuda --ranks 1 --base h100-sxm-80gb[/]
    """
    from shardwise.files.machine_text import to_toml

    out, samples = call.own.out, call.own.samples
    for path in (out, samples):
        _check_writable(path)
    with ProgressLine() as progress:
        done = measure(call.own, progress, device=call.case.device)
    _write(out, to_toml(done.machine).encode())
    document = _document(done, out)
    if samples is not None:
        _write(samples, msgspec.json.encode({**document, "samples": done.samples}) + b"\n")
    if call.output.form == JSON:
        write_json(document)
    else:
        call.output.show(done)
        call.output.say(f"\nMachine file: {out}")
    return 0


def _document(done: Calibration, out: Path) -> dict[str, object]:
    machine = done.machine
    return {
        "schema_version": done.schema_version,
        "name": machine.name,
        "device": machine.device,
        "about": machine.about,
        "ranks": done.ranks,
        "file": str(out),
        "sample_count": len(done.samples),
        "constants": machine.constants,
        "failed": done.failed,
        "notes": done.notes,
    }


def _check_writable(path: Path | None) -> None:
    """Before minutes are spent."""
    if path is None:
        return
    if path.is_dir():
        raise OptionError(f"{shown(str(path))} is a folder. Name a file to write.")
    if not path.parent.is_dir():
        raise OptionError(
            f"{shown(str(path))}: there is no folder {shown(str(path.parent))}. Make it, or name another "
            "file."
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{shown(str(path))} can't be written. Name another file.")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(
            f"{shown(str(path))} can't be written: {error.strerror or error}. Free space there, or name "
            "another file."
        ) from None
