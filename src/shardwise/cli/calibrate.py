"""`shardwise calibrate`: measures this machine's kernels, launches and collectives, and writes a machine file for predict."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from shardwise.cli.options import check_choice
from shardwise.core.errors import OptionError, RunError
from shardwise.core.machine import Constant, Machine
from shardwise.core.sample import Sample
from shardwise.core.shown import shown

if TYPE_CHECKING:
    from shardwise.calibrate.ranks import CalibrateReport
    from shardwise.cli.progress import ProgressLine
    from shardwise.core.program import Program

MOST_RANKS = 1024
KERNELS_S = {"cpu": 300.0, "cuda": 200.0}
QUICK_KERNELS_S = 10.0
FAILURES_SHOWN = 8
LINES = 20  # of progress, where it isn't a bar
_WHAT, _OUTPUT = "What is measured", "Output"


def calibrate(
    device: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda; auto takes GPUs where there are any.", rich_help_panel=_WHAT),
    ] = "auto",
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Ranks that work at once, and the largest group of the collectives.",
            min=1,
            max=MOST_RANKS,
            show_default="all GPUs; 2 on a CPU",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A few sizes of each, in seconds: to see that it works, not to predict by.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without any sign of life after which the run is given up.",
            min=1.0,
            rich_help_panel=_WHAT,
        ),
    ] = 600.0,
    base: Annotated[
        str | None,
        typer.Option(
            help="A machine of `shardwise machines`, or a file: its links are taken where one rank has none to measure.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="What to call the machine.", rich_help_panel=_OUTPUT)
    ] = "this machine",
    out: Annotated[Path, typer.Option(help="The machine file to write.", rich_help_panel=_OUTPUT)] = Path(
        "machine.toml"
    ),
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Also write everything that was timed, as JSON.",
            show_default="none",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
) -> int:
    """Measure this machine, and write a machine file that predict can use.

    Kernels by type and size, what the host takes to issue an op, fresh memory, and collectives by kind, size and group, through the
    functions that training steps use; on a CPU while all ranks work at once, as they do in a step. It takes minutes.

    [dim]shardwise calibrate --ranks 2 --out laptop.toml[/]
    [dim]shardwise calibrate --device cuda --name "my H100s" --out h100.toml --samples h100.json[/]
    [dim]shardwise calibrate --device cuda --ranks 1 --base h100-sxm-80gb[/]
    """
    check_choice("--device", device, ("auto", "cpu", "cuda"))
    if not name.strip():
        raise OptionError("--name is empty. Give the machine a name.")
    from shardwise.predict.machines import load_machine

    machine_base = load_machine(base) if base is not None else None
    for path in (out, samples):
        _check_writable(path)
    device_type, world = _ranks(device, ranks)
    console = Console(stderr=as_json)
    run = _Run(device_type, world, quick, timeout, name.strip(), machine_base)
    return run.run(console, out, samples, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Run:
    device_type: str
    world_size: int
    quick: bool
    timeout_s: float
    name: str
    base: Machine | None

    def run(self, console: Console, out: Path, samples_file: Path | None, *, as_json: bool) -> int:
        """The whole command after the checks; returns the exit code."""
        from shardwise.calibrate.ranks import merged
        from shardwise.cli.progress import ProgressLine
        from shardwise.files.machine_text import to_toml
        from shardwise.predict.fit import fit

        started = datetime.now(UTC)
        with ProgressLine() as progress:
            programs = self._programs(progress)
            progress.say(f"starting {self.world_size} rank{'s' * (self.world_size > 1)}")
            reports = self._launch(progress)
            progress.say("fitting")
            samples, share = merged(reports)
            if not any(sample.what == "matmul" for sample in samples):
                raise RunError(
                    f"calibrate: no matmul could be timed. {_failures(reports)[0] if _failures(reports) else ''}".strip()
                )
            machine = fit(samples, self._hardware(reports, share, started), programs, self.base)
        _write(out, to_toml(machine).encode())
        document = self._document(machine, samples, reports, out)
        if samples_file is not None:
            _write(samples_file, msgspec.json.encode({**document, "samples": samples}) + b"\n")
        if as_json:
            sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
            sys.stdout.buffer.flush()
        else:
            _show(console, machine, samples, self._notes(reports), out)
        return 0

    def _programs(self, progress: "ProgressLine") -> "dict[str, Program]":
        """Of the small steps whose launches are timed."""
        from shardwise.calibrate import issuing
        from shardwise.calibrate.ranks import ISSUED
        from shardwise.parallel.builtin import builtin_plan
        from shardwise.trace.trace import trace

        spec = issuing.small_llama(self.world_size)
        programs = {}
        ranks, mesh = self.world_size, issuing.mesh_of(self.world_size)
        for name, plan in ISSUED.items():
            progress.say(f"tracing a small step ({name})")
            settings, ids = issuing.settings_for(ranks), issuing.ids_of(spec, ranks)
            programs[name] = trace(spec, builtin_plan(plan), mesh, settings, device=self.device_type, ids=ids)
        return programs

    def _launch(self, progress: "ProgressLine") -> "list[CalibrateReport]":
        from shardwise.calibrate.ranks import CalibrateJob, CalibrateReport
        from shardwise.launch import run_ranks

        job = CalibrateJob(self.quick, QUICK_KERNELS_S if self.quick else KERNELS_S[self.device_type])
        results = run_ranks(
            "shardwise.calibrate.ranks:run",
            msgspec.json.encode(job),
            world_size=self.world_size,
            device_type=self.device_type,
            timeout_s=self.timeout_s,
            on_event=partial(_on_event, progress),
            threads_per_rank=self._threads(),
        )
        return [msgspec.json.decode(result, type=CalibrateReport) for result in results]

    def _threads(self) -> int:
        """As compare gives its ranks."""
        from shardwise.launch.environment import cores

        return max(1, cores() // self.world_size)

    def _hardware(self, reports: "Sequence[CalibrateReport]", share: float, started: datetime) -> "Hardware":
        from shardwise.launch.context import backend_of
        from shardwise.launch.environment import describe
        from shardwise.predict.draft import Hardware

        where = describe(
            "calibrate",
            started.isoformat(timespec="seconds"),
            device_type=self.device_type,
            backend=backend_of(self.device_type),
            world_size=self.world_size,
            threads=self._threads(),
        )
        versions = ", ".join(f"{name} {version}" for name, version in where.versions)
        about = (
            f"Measured {started:%Y-%m-%d} by calibrate{' --quick' if self.quick else ''} with {self.world_size} ranks of {where.threads_per_rank} "
            f"threads ({where.backend}), {share:.0%} of a core each. {where.device} on {where.machine}, {where.cores} cores; {versions}."
        )
        return Hardware(
            name=self.name,
            device=self.device_type,
            about=about,
            devices_per_node=self.world_size,
            memory_bytes=min(report.memory_bytes for report in reports),
            context_bytes=max(report.context_bytes for report in reports),
            units=reports[0].units,
            share=share,
        )

    def _document(
        self, machine: Machine, samples: Sequence[Sample], reports: "Sequence[CalibrateReport]", out: Path
    ) -> dict[str, object]:
        return {
            "schema_version": 1,
            "name": machine.name,
            "device": machine.device,
            "about": machine.about,
            "ranks": self.world_size,
            "file": str(out),
            "sample_count": len(samples),
            "constants": machine.constants,
            "failed": reports[0].failed,
            "notes": self._notes(reports),
        }

    def _notes(self, reports: "Sequence[CalibrateReport]") -> list[str]:
        """What a reader must know of what was not measured."""
        notes = []
        if self.quick:
            notes.append("Measured with --quick: a few sizes of each. Predictions by this file are rough.")
        if reports[0].left_out:
            notes.append(
                f"{reports[0].left_out} kernel sizes were left out: their time was over. The telling ones come first."
            )
        if self.world_size == 1:
            links = (
                "left out of the file: a plan over several ranks can't be predicted"
                if self.base is None
                else f"taken from {self.base.name}"
            )
            advice = "" if self.base is not None else " Name a machine file to take them from with --base."
            notes.append(
                f"Collectives were not measured, one rank having nobody to talk to; the links are {links}.{advice}"
            )
        share = min(report.share for report in reports)
        if share < 0.9:
            notes.append(
                f"A rank got {share:.0%} of a core while it was measured: this machine is busy, and times hold while it is as busy."
            )
        return notes + _failures(reports)


if TYPE_CHECKING:
    from shardwise.predict.draft import Hardware


def _failures(reports: "Sequence[CalibrateReport]") -> list[str]:
    failed = [f"left out, since it failed: {each.case} ({each.reason})" for each in reports[0].failed]
    more = (
        [f"and {len(failed) - FAILURES_SHOWN} more that failed; --json and --samples have all."]
        if len(failed) > FAILURES_SHOWN
        else []
    )
    return failed[:FAILURES_SHOWN] + more


def _ranks(device: str, ranks: int | None) -> tuple[str, int]:
    """The device type, and how many ranks."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device_type = device if device != "auto" else "cuda" if gpus else "cpu"
    if device_type == "cuda":
        if not gpus:
            raise OptionError(
                "--device cuda: this machine has no GPU that PyTorch can use. Use --device cpu."
            )
        return device_type, ranks or gpus
    return device_type, ranks or 2


def _check_writable(path: Path | None) -> None:
    """Before minutes are spent."""
    if path is None:
        return
    if path.is_dir():
        raise OptionError(f"{shown(str(path))} is a folder. Name a file to write.")
    if not path.parent.is_dir():
        raise OptionError(
            f"{shown(str(path))}: there is no folder {shown(str(path.parent))}. Make it, or name another file."
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
            f"{shown(str(path))} can't be written: {error.strerror or error}. Free space there, or name another file."
        ) from None


def _on_event(progress: "ProgressLine", event: bytes) -> None:
    from shardwise.calibrate.ranks import Progress

    told = msgspec.json.decode(event, type=Progress)
    if not progress.is_plain:
        progress.advance(told.done, told.total, told.text)
    elif told.done % max(1, told.total // LINES) == 0:
        left = f", {told.left_s:.0f} s left" if told.left_s is not None else ""
        progress.say(f"{told.text} ({told.done} of {told.total}{left})")


def _show(
    console: Console, machine: Machine, samples: Sequence[Sample], notes: Sequence[str], out: Path
) -> None:
    table = Table(
        "what",
        "value",
        "where it comes from",
        title=f"{machine.name}: {len(samples)} samples",
        title_justify="left",
        box=None,
    )
    for each in _telling(machine.constants):
        table.add_row(each.path, f"{each.value} {each.unit}", each.source)
    console.print(table)
    curves = sum(each.path.endswith(".points") for each in machine.constants)
    console.print(f"and {curves} curves over bytes: kernels, fresh memory, collectives.", highlight=False)
    for note in notes:
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nMachine file: {out}", markup=False, highlight=False, soft_wrap=True)


def _telling(constants: Sequence[Constant]) -> list[Constant]:
    """All but the curves, which are long."""
    return [each for each in constants if not each.path.endswith(".points")]
