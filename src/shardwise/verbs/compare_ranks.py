"""What one rank of `shardwise compare` does: checks every plan, builds them all, times them in rounds, brings
a report home."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from shardwise.core.batch_part import sequence_step
from shardwise.core.case import StepSettings
from shardwise.core.errors import OptionError, RunError
from shardwise.core.finding import Finding
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan
from shardwise.core.shown import shown
from shardwise.core.verification import Agreement
from shardwise.launch import RankContext
from shardwise.launch.broadcast import broadcast
from shardwise.launch.environment import VARIABLES
from shardwise.measure.profile import WARM_UP
from shardwise.measure.record import RankReport
from shardwise.measure.rounds import Turns, run_rounds
from shardwise.measure.subject import Subject
from shardwise.models.source import find_model
from shardwise.parallel.any_plan import name_of, plan_from
from shardwise.parallel.resolve import tied_parameters
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import MicroBatches, Portion
from shardwise.text.batches import Batches
from shardwise.text.stream import TokenStream
from shardwise.verify.expected import Unsharded, shake, unsharded
from shardwise.verify.observe import ModuleError
from shardwise.verify.proof import prove
from shardwise.verify.ranks import digest, disagreeing_digests, disagreements, replicated_parameters
from shardwise.verify.reasons import with_ties
from shardwise.verify.static import untied

CHECK_TOKENS = 128
"""Tokens per sequence of the check: enough for every kind of position, few enough for float64 on a laptop."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A plan that is timed. repeats: the label of the one that it is a second run of."""

    label: str
    plan: AnyPlan
    repeats: str | None = None


@dataclass(frozen=True, slots=True)
class CompareJob:
    """All that a rank needs to know, as JSON. plans: TOML texts. repeat_first: run the first plan a second
    time, for the noise floor.

    module: timed alone beside the steps, or, with module_only, instead of them. check: prove each plan first,
    at a depth of check_layers; 0 where the model isn't counted in layers. profile_steps: of each plan,
    recorded after the last round; 0: none. traces: folder for them (rank 0's counts), a folder for each plan.
    """

    model: str
    mesh: str
    plans: tuple[str, ...]
    labels: tuple[str, ...]
    settings: StepSettings
    rounds: int
    warmup: int
    module: str | None
    module_only: bool
    check: bool
    check_layers: int
    repeat_first: bool
    profile_steps: int = 0
    traces: str = ""

    @property
    def entrants(self) -> tuple[Entrant, ...]:
        """The plans, and the first again where it is repeated."""
        once = tuple(map(Entrant, self.labels, map(plan_from, self.plans)))
        first = once[0]
        return (
            (*once, Entrant(f"{first.label} (again)", first.plan, first.label)) if self.repeat_first else once
        )

    @property
    def units(self) -> int:
        """Of work, as progress counts it."""
        n_plans = len(self.plans)
        steps = (n_plans + self.repeat_first) * (1 + self.warmup + self.rounds)
        return n_plans * self.check + steps + n_plans * bool(self.profile_steps)


@dataclass(frozen=True, slots=True)
class Progress:
    """An event for the command's progress bar and the run folder: `done` of `total` units of work."""

    done: int
    total: int
    text: str
    label: str | None = None
    round: int | None = None
    rank0_s: float | None = None


def pack(job: CompareJob, stream: TokenStream | None) -> bytes:
    """The payload of run(): the job's JSON on one line, then the token stream (rank 0's counts)."""
    return msgspec.json.encode(job) + b"\n" + (stream.to_bytes() if stream is not None else b"")


def run(context: RankContext, payload: bytes) -> bytes:
    """Entry of every rank: returns a RankReport in msgpack, for an error may be infinite, which JSON has no
    word for."""
    head, _, body = payload.partition(b"\n")
    job = msgspec.json.decode(head, type=CompareJob)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stream = TokenStream.from_bytes(broadcast(body, context))
    return msgspec.msgpack.encode(_Run(context, job, stream).report())


class _Run:
    def __init__(self, context: RankContext, job: CompareJob, stream: TokenStream) -> None:
        self.context = context
        self.job = job
        self.entrants = job.entrants
        self.source = find_model(job.model)
        self.mesh = device_mesh(Mesh.parse(job.mesh), context.device.type)
        settings = job.settings
        self.portion = Portion.on(self.mesh, settings.accumulation, reduce_once=settings.reduce_once)
        self.batches = Batches(stream, job.settings.batch, job.settings.seq)
        self.turns = Turns(context.device, len(self.entrants))
        self.done = 0

    def report(self) -> RankReport:
        group = self.portion.tp_group
        ids = torch.from_numpy(self.batches.stream.ids.copy())
        findings = disagreements("token ids", [("ids", ids)], group)
        agreements = self._check() if self.job.check and not findings else {}
        checked = tuple(agreements.values())
        if findings or not all(agreement.agrees for agreement in checked):
            return RankReport((), findings, checked)
        subjects, initial = self._build()
        findings = disagreeing_digests("initial weights", initial, group)
        findings += self._drifted(subjects, "replicated parameters at the start")
        if not findings:
            self._measure(subjects)
            self._profile(subjects)
            findings = self._drifted(subjects, "replicated parameters at the end")
        pairs = zip(self.entrants, subjects, strict=True) if not findings else ()
        measurements = tuple(
            subject.measurement(each.label, each.repeats, agreements.get(each.repeats or each.label))
            for each, subject in pairs
        )
        return RankReport(measurements, findings, checked, variables=tuple(_variables()))

    def _check(self) -> dict[str, Agreement]:
        """Every plan, by its label, proved as `verify` proves it, in float64, over the step's own portions;
        without the optimizer's steps, for AdamW's state of the whole model would need three times the memory
        on every rank."""
        job, portion = self.job, self.portion
        tp = portion.tp_group.size()
        # a multiple of tp, as sequence parallelism needs
        step = sequence_step(Mesh.parse(job.mesh).context, tp)
        seq = min(job.settings.seq, max(step, CHECK_TOKENS // step * step))
        batch = Batches(self.batches.stream, portion.smallest_batch, seq).at(0)

        self.context.note("unsharded reference")
        expected, build = self._unsharded([(batch.ids_BS, batch.labels_BS)], tp)
        whole = partial(build, None)
        ties = set(tied_parameters(whole()).values())
        agreements = {}
        for label, plan in ((each.label, each.plan) for each in self.entrants if each.repeats is None):
            self.context.note(f'check of "{label}" against the unsharded model')
            model = build(plan)
            try:
                proof, findings = prove(model, expected, whole, portion)
            except RunError as error:
                raise RunError(f'plan "{label}": {error} Nothing was timed.') from None
            findings = tuple(with_ties(findings, untied(ties, model)))
            agreements[label] = Agreement.of(proof, findings, plan=name_of(plan), layers=job.check_layers)
            self._advance(f"checked {label}", label)
        return agreements

    def _unsharded(
        self, batches: list[tuple[Tensor, Tensor]], tp: int
    ) -> tuple[Unsharded, Callable[[AnyPlan | None], nn.Module]]:
        """(what the unsharded model gives; how to make it again, and sharded): in float64, or in float32 for
        one that doesn't run in that. Raises RunError where it runs in neither."""
        job, failures = self.job, []
        pipeline = job.settings.pipeline(Mesh.parse(job.mesh))
        if job.check_layers:
            pipeline = replace(pipeline, layers=())  # counts are of all layers

        def build(plan: AnyPlan | None, dtype: torch.dtype) -> nn.Module:
            return build_model(
                self.source,
                plan,
                self.mesh if plan is not None else None,
                dtype=dtype,
                device=self.context.device,
                seed=job.settings.seed,
                reshard=job.settings.reshard_after_forward,
                recompute=job.settings.recompute,
                recompute_layers=job.settings.recompute_layers,
                depth=max(job.check_layers, pipeline.parts) if job.check_layers else None,
                pipeline=pipeline if plan is not None else None,
                on_parameter=shake,
            )

        for dtype in (torch.float64, torch.float32):
            build_in = partial(build, dtype=dtype)
            try:
                portion = self.portion.of_one_process
                whole = unsharded(build_in(None), batches, parts=tp, portion=portion, with_steps=False)
                return whole, build_in
            except (ModuleError, RunError) as error:
                failures.append(f"in {str(dtype).removeprefix('torch.')}, {shown(error, 300)}")
        raise RunError(f"the check, unsharded {' '.join(failures)} Leave the check out with --no-check.")

    def _build(self) -> tuple[list[Subject], list[tuple[str, int]]]:
        """All subjects, each after its first step; and digests of the whole initial parameters."""
        subjects = []
        initial: list[tuple[str, int]] = []
        for entrant in self.entrants:
            self.context.note(f'first step of "{entrant.label}"')
            subject = Subject(
                self.source,
                entrant.plan,
                self.mesh,
                self.job.settings,
                self.context.device,
                on_parameter=lambda name, whole: initial.append((name, digest(whole))),
            )
            subject.first_step(self._batch(0))
            subjects.append(subject)
            self.turns.built(subject)
            self._advance(f"built {entrant.label}", entrant.label)
        return subjects, initial

    def _measure(self, subjects: Sequence[Subject]) -> None:
        job = self.job
        for label, subject in self._in_turn(subjects):
            for step in range(1, 1 + job.warmup):
                self.context.note(f'warm-up of "{label}"')
                subject.warm_up(self._batch(step))
                self._advance(f"warmed up {label}", label)
            if job.module is not None:
                self._take_alone(subject, job.module)
        run_rounds(
            subjects,
            job.rounds,
            self._batch,
            first_step=1 + job.warmup,
            module_only=job.module_only,
            turns=self.turns,
            on_timed=self._on_timed,
        )

    def _take_alone(self, subject: Subject, module: str) -> None:
        """Where nobody asked for the module, one that can't be timed alone is left out."""
        try:
            subject.take_alone(module, self._batch(0)[0])
        except OptionError:
            if self.job.module_only:
                raise

    def _profile(self, subjects: Sequence[Subject]) -> None:
        """A few steps of each plan under the profiler, after the clock has stopped for good."""
        job = self.job
        if not job.profile_steps:
            return
        first = 1 + job.warmup + job.rounds
        folder = Path(broadcast(job.traces.encode(), self.context).decode())
        for label, subject in self._in_turn(subjects[: len(job.plans)]):
            self.context.note(f'profile of "{label}"')
            batches = [self._batch(first + step) for step in range(WARM_UP + job.profile_steps)]
            subject.profiled_steps(str(folder / folder_name(label)), batches)
            self._advance(f"profiled {label}", label)

    def _drifted(self, subjects: Sequence[Subject], what: str) -> tuple[Finding, ...]:
        """Of parameters that every rank of tp holds whole, and that aren't equal on them."""
        findings: tuple[Finding, ...] = ()
        for label, subject in self._in_turn(subjects):
            group = self.portion.tp_group
            held = replicated_parameters(subject.model, group).items()
            findings += disagreements(f"{label}: {what}", held, group)
        return findings

    def _in_turn(self, subjects: Sequence[Subject]) -> Iterator[tuple[str, Subject]]:
        """Each with its label, while it has the device."""
        for entrant, subject in zip(self.entrants, subjects, strict=False):
            with self.turns.of(subject):
                yield entrant.label, subject

    def _batch(self, step: int) -> MicroBatches:
        """This rank's portion of a step's global batch; on the host, where routes are computed."""
        batch = self.batches.at(step)
        return self.portion.cut(batch.ids_BS, batch.labels_BS)

    def _on_timed(self, round_: int, index: int, seconds: float) -> None:
        label, text = self.entrants[index].label, f"round {round_ + 1} of {self.job.rounds}"
        self.context.note(f"{text}, after {label}")
        self._advance(text, label, round_, seconds)

    def _advance(
        self, text: str, label: str, round_: int | None = None, seconds: float | None = None
    ) -> None:
        self.done += 1
        if self.context.rank == 0:
            progress = Progress(self.done, self.job.units, text, label, round_, seconds)
            self.context.report(msgspec.json.encode(progress))


def _variables() -> Iterator[tuple[str, str]]:
    """Environment variables of this rank that bear on its times."""
    return ((name, os.environ[name]) for name in VARIABLES if name in os.environ)


def folder_name(label: str) -> str:
    """A plan's folder among the traces: its label without what a file name can't have."""
    return re.sub(r"[^A-Za-z0-9@._-]+", "-", label).strip(".-") or "plan"
