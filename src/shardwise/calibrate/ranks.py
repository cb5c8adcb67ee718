"""What each rank does for `shardwise calibrate`: kernels (all ranks at once, as steps run), then issuing,
then collectives.

Ranks agree before each case, so that they run it together and stop together when the time for kernels is
over. A case that fails is noted and left out.
"""

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import msgspec
import torch
import torch.distributed as dist

from shardwise.calibrate import arrivals, issuing, links
from shardwise.calibrate.case import Case, timed_case
from shardwise.calibrate.cases import cases_for
from shardwise.calibrate.clock import Timing, host_clock, usual_share
from shardwise.core.collective import CollectiveKind
from shardwise.core.errors import PlanError
from shardwise.core.machine import FRESH
from shardwise.core.program import OpKind
from shardwise.core.sample import Failed, Sample
from shardwise.launch.context import RankContext
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import device_mesh

ISSUED = {"native": "rowwise", "dtensor": "rowwise@dtensor"}
"""Plans of the small steps whose issuing is timed, by engine."""

CLEAN_EVERY = 25
TOUCH_EVERY_S = 1.5
FRESH_BYTES = tuple(size << 20 for size in (30, 34, 64, 128))
SAID = 200  # characters of an error's text
# of memory that a case may take, beside what its op needs for itself
MOST_OF_MEMORY = 0.4


class CalibrateJob(msgspec.Struct, frozen=True):
    """kernels_s: the time that kernels may take."""

    quick: bool
    kernels_s: float


class Progress(msgspec.Struct, frozen=True):
    """`done` of `total` cases; left_s: what is left, about."""

    done: int
    total: int
    text: str
    left_s: float | None


class CalibrateReport(msgspec.Struct, frozen=True):
    """One rank's samples. share: of a core that the rank usually got while kernels ran. left_out: cases that
    there was no time for. memory_bytes: of its device; context_bytes: held beside tensors; units:
    multiprocessors, 1 on a CPU."""

    samples: tuple[Sample, ...]
    failed: tuple[Failed, ...]
    share: float
    left_out: int
    memory_bytes: int
    context_bytes: int
    units: int


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of launch.run_ranks."""
    job = msgspec.json.decode(payload, type=CalibrateJob)
    return msgspec.json.encode(measure(context, job, cases_for(context.device.type, quick=job.quick)))


def measure(context: RankContext, job: CalibrateJob, cases: Sequence[Case]) -> CalibrateReport:
    """All of one rank's measuring, with these kernels."""
    return _Calibration(context, job).run(cases)


class _Calibration:
    def __init__(self, context: RankContext, job: CalibrateJob) -> None:
        self.context = context
        self.job = job
        self.device = context.device
        self.samples: list[Sample] = []
        self.failed: list[Failed] = []
        self.timings: list[Timing] = []
        self.total = self.context_bytes = 0
        self.began_s = time.monotonic()

    def run(self, cases: Sequence[Case]) -> CalibrateReport:
        self.context_bytes = self._context()
        cases = self._fitting(cases)
        world = links.groups(self.context.world_size, self.device.type)
        collectives = list(links.plan(world, self.device.type, quick=self.job.quick))
        self.total = len(cases) + len(collectives) + 4
        if self.device.type == "cpu":
            _settle_allocator()
        left_out = self._kernels(cases)
        self._issuing(len(cases))
        self._collectives(collectives, len(cases) + 3)
        self._arrivals(world, self.total - 1)
        share = usual_share(self.timings) if torch.get_num_threads() == 1 else 1.0
        memory_bytes, units = self._device()
        return CalibrateReport(
            tuple(self.samples), tuple(self.failed), share, left_out, memory_bytes, self.context_bytes, units
        )

    def _device(self) -> tuple[int, int]:
        """Its memory (on a CPU a rank's part of it) and multiprocessors."""
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            return properties.total_memory, properties.multi_processor_count
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.context.world_size, 1

    def _context(self) -> int:
        """Bytes that this process holds before its first tensor."""
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            return max(0, total - free - torch.cuda.memory_reserved(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _fitting(self, cases: Sequence[Case]) -> Sequence[Case]:
        """Those that memory is there for."""
        if self.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.device)[0] * MOST_OF_MEMORY
            return [case for case in cases if case.n_bytes <= room]
        return cases

    def _kernels(self, cases: Sequence[Case]) -> int:
        """How many were left out because time was over."""
        deadline_s = self.began_s + self.job.kernels_s
        fresh = FreshMemory()
        try:
            for number, case in enumerate(cases):
                if self._all_agree(time.monotonic() > deadline_s):
                    return len(cases) - number
                words = (
                    case.op.removeprefix("aten::"),
                    case.variant,
                    case.dtype,
                    "x".join(map(str, case.shape)),
                )
                what = " ".join(filter(None, words))
                self._say(number, what, deadline_s)
                self._kernel(case, what)
                if self.device.type == "cpu":
                    fresh.touch()
                elif number % CLEAN_EVERY == 0:
                    torch.cuda.empty_cache()
            return 0
        finally:
            self.samples += fresh.samples(self.context.world_size)

    def _kernel(self, case: Case, what: str) -> None:
        try:
            with torch.set_grad_enabled("backward" in case.op):
                sample, timing = timed_case(case, self.device)
        except (RuntimeError, NotImplementedError, TypeError, MemoryError) as error:
            self._note_failure(what, error)
            return
        self.samples.append(replace(sample, ranks=self.context.world_size))
        self.timings.append(timing)

    def _issuing(self, done: int) -> None:
        """Of a tiny model's steps, under each engine."""
        spec, world = issuing.small_llama(self.context.world_size), self.context.world_size
        for number, (engine, plan) in enumerate(ISSUED.items()):
            self._say(done + number, f"issuing ops ({engine})")
            try:
                mesh = device_mesh(issuing.mesh_of(world), self.device.type)
                self.samples += issuing.time_phases(
                    spec, builtin_plan(plan), mesh, self.device, engine, quick=self.job.quick
                )
            except (RuntimeError, PlanError) as error:
                self._note_failure(f"issuing ops ({engine})", error)
        self._say(done + 2, "issuing collectives")
        try:
            self.samples.append(
                issuing.time_differentiable(issuing.axis_of_all(self.device.type), self.device)
            )
        except RuntimeError as error:
            self._note_failure("issuing collectives", error)

    def _collectives(self, planned: Sequence[tuple[links.Group, CollectiveKind, int]], done: int) -> None:
        began_s = time.monotonic()
        for number, (group, kind, full_bytes) in enumerate(planned):
            left_s = (time.monotonic() - began_s) / number * (len(planned) - number) if number else None
            self._report(done + number, f"{kind} of {full_bytes >> 10} KiB over {group.size} ranks", left_s)
            dist.barrier()
            if group.axis is not None:
                self.samples.append(
                    links.time_collective(
                        kind,
                        full_bytes,
                        group.axis,
                        self.device,
                        one_clock=group.one_clock,
                        quick=self.job.quick,
                    )
                )
        dist.barrier()

    def _arrivals(self, world: Sequence[links.Group], done: int) -> None:
        for group in world:
            self._report(done, f"when {group.size} ranks come to a collective", None)
            dist.barrier()
            if group.axis is not None and group.one_clock:
                self.samples += arrivals.time_arrivals(group.axis, self.device, quick=self.job.quick)
        dist.barrier()

    def _all_agree(self, over: bool) -> bool:
        """Whether any rank's time is over. Ranks meet here."""
        if self.context.world_size == 1:
            return over
        any_over = torch.tensor(int(over), device=self.device)
        dist.all_reduce(any_over, op=dist.ReduceOp.MAX)
        return bool(any_over.item())

    def _note_failure(self, what: str, error: Exception) -> None:
        said = " ".join(str(error).split())[:SAID]
        self.failed.append(Failed(what, f"{type(error).__name__}: {said}".removesuffix(": ")))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _say(self, done: int, text: str, deadline_s: float | None = None) -> None:
        spent_s = time.monotonic() - self.began_s
        left_s = spent_s / done * (self.total - done) if done >= 10 else None
        if left_s is not None and deadline_s is not None:
            left_s = min(left_s, max(0.0, deadline_s - time.monotonic()) + left_s * 0.2)
        self._report(done, text, left_s)

    def _report(self, done: int, text: str, left_s: float | None) -> None:
        self.context.note(text)
        if self.context.rank == 0:
            self.context.report(msgspec.json.encode(Progress(done, self.total, text, left_s)))


class FreshMemory:
    """Times zeros in memory that the system hands out anew, each time a while after it was given back, as in
    a step. (Handed out again at once it is cheap. A while later its pages may have gone back to the system,
    or to the machine below a virtual one.)"""

    def __init__(self) -> None:
        self._times: dict[int, list[float]] = {n_bytes: [] for n_bytes in FRESH_BYTES}
        self._last_s = time.monotonic()

    def touch(self) -> None:
        """Once, where the last time was long enough ago."""
        if time.monotonic() - self._last_s < TOUCH_EVERY_S:
            return
        clock = host_clock(torch.device("cpu"))
        held = []  # or one would get what the one before it gave back
        for n_bytes in (*FRESH_BYTES, *reversed(FRESH_BYTES)):
            start = clock()
            held.append(torch.zeros(n_bytes, dtype=torch.uint8))
            self._times[n_bytes].append(clock() - start)
        held.clear()
        self._last_s = time.monotonic()

    def samples(self, ranks: int) -> list[Sample]:
        """The mean counts: a step meets them all."""
        samples = []
        for n_bytes, times in self._times.items():
            if times:
                seen = (fmean(times), min(times), max(times), len(times))
                sample = Sample(OpKind.FILL.value, FRESH, "uint8", (n_bytes,), *seen, write_bytes=n_bytes)
                samples.append(replace(sample, ranks=ranks))
        return samples


def _settle_allocator() -> None:
    """After some freed tensor just below glibc's largest threshold (32 MiB) it takes smaller ones from what
    it holds, as in a run's later steps; larger ones come afresh from the system each time (mallopt(3),
    M_MMAP_THRESHOLD)."""
    torch.ones(31 << 20, dtype=torch.uint8)


def merged(reports: Sequence[CalibrateReport]) -> tuple[tuple[Sample, ...], float]:
    """All ranks' samples of one thing as one, the mean; and the mean share of a core."""
    by_thing: dict[tuple[object, ...], list[Sample]] = defaultdict(list)
    for report in reports:
        for sample in report.samples:
            by_thing[sample.what, sample.name, sample.dtype, sample.shape, sample.ranks].append(sample)
    samples = tuple(
        replace(
            alike[0],
            seconds=fmean(sample.seconds for sample in alike),
            low_s=min(sample.low_s for sample in alike),
            high_s=max(sample.high_s for sample in alike),
        )
        for alike in by_thing.values()
    )
    return samples, fmean(report.share for report in reports)
