"""calibrate: this machine -> Calibration: its kernels, launches and collectives, timed on all ranks at
once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from shardwise.core.errors import OptionError, RunError
from shardwise.core.machine import Machine
from shardwise.core.option import Option, check_options
from shardwise.core.sample import ARRIVAL, Calibration
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    from shardwise.calibrate.ranks import CalibrateReport
    from shardwise.core.program import Program
    from shardwise.predict.draft import Hardware

MOST_RANKS = 1024
KERNELS_S = {"cpu": 300.0, "cuda": 200.0}
QUICK_KERNELS_S = 10.0
FAILURES_SHOWN = 8
BUSY = 0.9
WHAT, OUTPUT = "What is measured", "Output"


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What only calibrate knows."""

    ranks: Annotated[
        int | None,
        Option(
            "Ranks that work at once, and the largest group of the collectives.",
            WHAT,
            1,
            MOST_RANKS,
            shown="all GPUs; 2 on a CPU",
        ),
    ] = None
    quick: Annotated[
        bool, Option("A few sizes of each, in seconds: to see that it works, not to predict by.", WHAT)
    ] = False
    timeout: Annotated[
        float, Option("Seconds without any sign of life after which the run is given up.", WHAT, 1)
    ] = 600.0
    base: Annotated[
        str | None,
        Option(
            "A machine of `shardwise machines`, or a file: its links are taken where one rank has none to "
            "measure.",
            WHAT,
        ),
    ] = None
    name: Annotated[str, Option("What to call the machine.", OUTPUT)] = "this machine"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.name.strip():
            raise OptionError("--name is empty. Give the machine a name.")


def calibrate(
    options: CalibrateOptions | None = None, progress: Progress = silent, *, device: str = "auto"
) -> Calibration:
    """Takes minutes. device: auto takes GPUs where there are any. Raises InputError for a base that isn't
    known, RunError where not even a matmul could be timed."""
    from shardwise.calibrate.ranks import merged
    from shardwise.predict.fit import fit
    from shardwise.predict.machines import load_machine

    options = options or CalibrateOptions()
    base = load_machine(options.base) if options.base is not None else None
    run = _Run(*_ranks(device, options.ranks), options, base)
    started = datetime.now(UTC)
    programs = run.programs(progress)
    progress(f"starting {run.world_size} rank{'s' * (run.world_size > 1)}")
    reports = run.launch(progress)
    progress("fitting")
    samples, share = merged(reports)
    failures = tuple(_failures(reports[0]))
    if not any(sample.what == "matmul" for sample in samples):
        raise RunError(f"calibrate: no matmul could be timed. {(*failures, '')[0]}".strip())
    machine = fit(samples, run.hardware(reports, share, started), programs, base)
    notes = (*run.notes(reports), *_unknown(machine), *failures)
    return Calibration(machine, run.world_size, tuple(samples), reports[0].failed, notes)


def _ranks(device: str, ranks: int | None) -> tuple[str, int]:
    """The device type, and how many ranks."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not gpus):
        return "cpu", ranks or 2
    if not gpus:
        raise OptionError("--device cuda: this machine has no GPU that PyTorch can use. Use --device cpu.")
    return "cuda", ranks or gpus


@dataclass(frozen=True, slots=True)
class _Run:
    device_type: str
    world_size: int
    options: CalibrateOptions
    base: Machine | None

    def programs(self, progress: Progress) -> "dict[str, Program]":
        """Of the small steps whose launches are timed."""
        from shardwise.calibrate import issuing
        from shardwise.calibrate.ranks import ISSUED
        from shardwise.parallel.builtin import builtin_plan
        from shardwise.trace.trace import trace

        ranks, programs = self.world_size, {}
        spec, mesh = issuing.small_llama(ranks), issuing.mesh_of(ranks)
        settings, ids = issuing.settings_for(ranks), issuing.ids_of(spec, ranks)
        for name, plan in ISSUED.items():
            progress(f"tracing a small step ({name})")
            programs[name] = trace(spec, builtin_plan(plan), mesh, settings, device=self.device_type, ids=ids)
        return programs

    def launch(self, progress: Progress) -> "list[CalibrateReport]":
        import msgspec

        from shardwise.calibrate.ranks import CalibrateJob, CalibrateReport
        from shardwise.calibrate.ranks import Progress as Told
        from shardwise.launch import run_ranks
        from shardwise.launch.environment import threads_per_rank

        def on_event(event: bytes) -> None:
            told = msgspec.json.decode(event, type=Told)
            progress(told.text, told.done, told.total, told.left_s)

        quick = self.options.quick
        job = CalibrateJob(quick, QUICK_KERNELS_S if quick else KERNELS_S[self.device_type])
        results = run_ranks(
            "shardwise.calibrate.ranks:run",
            msgspec.json.encode(job),
            world_size=self.world_size,
            device_type=self.device_type,
            timeout_s=self.options.timeout,
            on_event=on_event,
            threads_per_rank=threads_per_rank(self.world_size),
        )
        return [msgspec.json.decode(result, type=CalibrateReport) for result in results]

    def hardware(self, reports: "Sequence[CalibrateReport]", share: float, started: datetime) -> "Hardware":
        from shardwise.launch.environment import describe
        from shardwise.predict.draft import Hardware

        where = describe(
            "calibrate",
            started.isoformat(timespec="seconds"),
            device_type=self.device_type,
            world_size=self.world_size,
        )
        versions = ", ".join(f"{name} {version}" for name, version in where.versions)
        about = (
            f"Measured {started:%Y-%m-%d} by calibrate{' --quick' if self.options.quick else ''} with "
            f"{self.world_size} ranks of {where.threads_per_rank} threads ({where.backend}), {share:.0%} of "
            "a core "
            f"each. {where.device} on {where.machine}, {where.cores} cores; {versions}."
        )
        return Hardware(
            name=self.options.name.strip(),
            device=self.device_type,
            about=about,
            devices_per_node=self.world_size,
            memory_bytes=min(report.memory_bytes for report in reports),
            context_bytes=max(report.context_bytes for report in reports),
            units=reports[0].units,
            share=share,
        )

    def notes(self, reports: "Sequence[CalibrateReport]") -> Iterator[str]:
        """What a reader must know of what was not measured."""
        if self.options.quick:
            yield "Measured with --quick: a few sizes of each. Predictions by this file are rough."
        if left_out := reports[0].left_out:
            yield (
                f"{left_out} kernel sizes were left out: their time was over. The telling ones come first."
            )
        if self.world_size == 1:
            links, advice = (
                (
                    "left out of the file: a plan over several ranks can't be predicted",
                    " Name a machine file to take them from with --base.",
                )
                if self.base is None
                else (f"taken from {self.base.name}", "")
            )
            yield (
                "Collectives were not measured, one rank having nobody to talk to; the links are "
                f"{links}.{advice}"
            )
        elif not any(sample.what == ARRIVAL for sample in reports[0].samples):
            yield (
                "How far apart ranks come to a collective was not measured, for ranks of several hosts have "
                "no clock in common: what they wait is in the collectives' times alone."
            )
        share = min(report.share for report in reports)
        if share < BUSY:
            yield (
                f"A rank got {share:.0%} of a core while it was measured: this machine is busy, and times "
                "hold while "
                "it is as busy."
            )


def _unknown(machine: Machine) -> Iterator[str]:
    """What the host takes, where it couldn't be told from kernels."""
    if unknown := machine.launch.unknown:
        yield (
            f"{', '.join(unknown)}: unknown, for the small steps took no longer than their kernels by "
            "themselves do. The file leaves it out, and predictions count it as nothing."
        )


def _failures(report: "CalibrateReport") -> Iterator[str]:
    for each in report.failed[:FAILURES_SHOWN]:
        yield f"left out, since it failed: {each.case} ({each.reason})"
    if (more := len(report.failed) - FAILURES_SHOWN) > 0:
        yield f"and {more} more that failed; --json and --samples have all."
