"""What one rank of `shardwise compare` does: checks every plan, builds them all, times them in rounds, brings a report home."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.case import StepSettings
from shardwise.core.finding import Finding
from shardwise.core.mesh import TENSOR_AXIS, Mesh, sees_other_tokens
from shardwise.core.plan import Plan
from shardwise.core.verification import Agreement
from shardwise.launch import RankContext
from shardwise.launch.environment import VARIABLES
from shardwise.measure.profile import WARM_UP
from shardwise.measure.record import RankRecord, RankReport
from shardwise.measure.rounds import run_rounds
from shardwise.measure.subject import MicroBatches, ModuleAlone, Subject
from shardwise.models.specs import get_spec
from shardwise.step.build import build_model, device_mesh
from shardwise.text.batches import Batches
from shardwise.text.stream import TokenStream
from shardwise.verify.expected import shake, unsharded
from shardwise.verify.observe import Portion
from shardwise.verify.proof import prove
from shardwise.verify.ranks import digest, disagreeing_digests, disagreements, replicated_parameters

CHECK_TOKENS = 128
"""Tokens per sequence of the check: enough for every kind of position, few enough for float64 on a laptop."""


@dataclass(frozen=True, slots=True)
class CompareJob:
    """All that a rank needs to know, as JSON. plans: TOML texts. repeat_first: run the first plan a second time, for the noise floor.

    module: timed alone beside the steps, or, with module_only, instead of them. check_layers: depth of the checked model; 0: no check.
    profile_steps: of each plan, recorded after the last round; 0: none. traces: folder for them (rank 0's counts), a folder for each plan.
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
    check_layers: int
    repeat_first: bool
    profile_steps: int = 0
    traces: str = ""


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
    """Entry of every rank: returns a RankReport in msgpack."""
    head, _, body = payload.partition(b"\n")
    job = msgspec.json.decode(head, type=CompareJob)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return msgspec.msgpack.encode(
        _Run(context, job, _broadcast(body, context)).report()
    )  # an error may be infinite, which JSON has no word for


class _Run:
    def __init__(self, context: RankContext, job: CompareJob, stream: TokenStream) -> None:
        self.context = context
        self.job = job
        self.spec = get_spec(job.model)
        self.shape = Mesh.parse(job.mesh)
        self.mesh = device_mesh(self.shape, context.device.type)
        self.batches = Batches(stream, job.settings.batch, job.settings.seq)
        self.plans = [Plan.from_toml(text) for text in job.plans]
        self.labels = list(job.labels)
        self.repeats: list[str | None] = [None] * len(self.plans)
        if job.repeat_first:
            self.plans.append(self.plans[0])
            self.labels.append(f"{self.labels[0]} (again)")
            self.repeats.append(self.labels[0])
        self.check_units = len(job.plans) if job.check_layers else 0
        self.total = (
            self.check_units
            + len(self.plans) * (1 + job.warmup + job.rounds)
            + len(job.plans) * bool(job.profile_steps)
        )
        self.done = 0
        self.take_turns = False

    def report(self) -> RankReport:
        tp_group = self.mesh.get_group(TENSOR_AXIS)
        ids = torch.from_numpy(self.batches.stream.ids.copy())
        findings = disagreements("token ids", [("ids", ids)], tp_group)
        agreements = self._check() if self.job.check_layers and not findings else ()
        if findings or not all(found.agrees for found in agreements):
            return RankReport((), findings, agreements)
        subjects, initial = self._build()
        findings = disagreeing_digests("initial weights", initial, tp_group) + self._replicated(
            subjects, "replicated parameters at the start"
        )
        if not findings:
            self._measure(subjects)
            self._profile(subjects)
            findings = self._replicated(subjects, "replicated parameters at the end")
        by_plan = dict(zip(self.job.labels, agreements, strict=False))
        records = (
            []
            if findings
            else [self._record(index, subject, by_plan) for index, subject in enumerate(subjects)]
        )
        return RankReport(tuple(records), findings, agreements, tuple(self._notes()), rank_variables())

    def _check(self) -> tuple[Agreement, ...]:
        """Every plan proved as `verify` proves it, in float64, over the step's own portions; without the optimizer's steps, for AdamW's state of
        the whole model would need three times the memory on every rank."""
        job, spec = self.job, self.spec.with_layers(self.job.check_layers)
        portion = Portion(
            self.mesh, _data_place(self.mesh), self.shape.data_parallel, job.settings.accumulation
        )
        seq = check_sequence(job.settings.seq, self.shape.tp)
        batch = Batches(self.batches.stream, portion.places * portion.micro_batches, seq).at(0)

        def build(plan: Plan | None) -> nn.Module:
            return build_model(
                spec,
                plan,
                self.mesh if plan is not None else None,
                dtype=torch.float64,
                device=self.context.device,
                seed=job.settings.seed,
                recompute=job.settings.recompute,
                on_parameter=shake,
            )

        self._note("unsharded reference")
        whole = partial(build, None)
        expected = unsharded(
            whole(), [(batch.ids_BS, batch.labels_BS)], parts=self.shape.tp, with_steps=False
        )
        agreements = []
        for label, plan in zip(job.labels, self.plans, strict=False):
            self._note(f'check of "{label}" against the unsharded model')
            proof, findings = prove(build(plan), expected, whole, portion)
            agreements.append(Agreement.of(proof, findings, plan=plan.name, layers=job.check_layers))
            self._advance(f"checked {label}", label)
        return tuple(agreements)

    def _build(self) -> tuple[list[Subject], list[tuple[str, int]]]:
        """All subjects, each after its first step; and digests of the whole initial parameters."""
        subjects = []
        initial: list[tuple[str, int]] = []
        for label, plan in zip(self.labels, self.plans, strict=True):
            self._note(f'first step of "{label}"')
            subject = Subject(
                self.spec,
                plan,
                self.mesh,
                self.job.settings,
                self.context.device,
                on_parameter=lambda name, whole: initial.append((name, digest(whole))),
            )
            subject.first_step(self._micro_batches(self.batches, 0))
            subjects.append(subject)
            if self._parked(subject):
                subject.park()
            self._advance(f"built {label}", label)
        return subjects, initial

    def _parked(self, subject: Subject) -> bool:
        """Whether the plans must take turns on the device: all of them with one's working memory would not fit."""
        if (
            self.context.device.type != "cuda"
            or subject.memory is None
            or subject.memory.active_bytes is None
        ):
            return False
        kept = subject.memory.parameter_bytes + subject.memory.gradient_bytes + subject.memory.optimizer_bytes
        total = torch.cuda.get_device_properties(self.context.device).total_memory
        fits = kept * (len(self.plans) - 1) + subject.memory.active_bytes <= 0.85 * total
        verdicts = torch.tensor(int(not fits), device=self.context.device)
        dist.all_reduce(verdicts, op=dist.ReduceOp.MAX)
        return bool(verdicts.item())

    def _measure(self, subjects: Sequence[Subject]) -> None:
        job = self.job
        parked = self.take_turns = any(subject.is_parked for subject in subjects)
        alone: list[ModuleAlone | None] = [None] * len(subjects)
        for index, (label, subject) in enumerate(zip(self.labels, subjects, strict=True)):
            if parked:
                subject.unpark()
            for step in range(1, 1 + job.warmup):
                self._note(f'warm-up of "{label}"')
                subject.warm_up(self._micro_batches(self.batches, step))
                self._advance(f"warmed up {label}", label)
            if job.module is not None:
                module = ModuleAlone(subject.model, job.module, self._micro_batches(self.batches, 0)[0])
                subject.timed_module(module, keep=False)
                alone[index] = module
            if parked:
                subject.park()
        run_rounds(
            subjects,
            job.rounds,
            lambda step: self._micro_batches(self.batches, step),
            first_step=1 + job.warmup,
            alone=alone,
            module_only=job.module_only,
            parked=parked,
            on_timed=self._on_timed,
        )
        if parked:
            for subject in subjects:
                subject.unpark()

    def _profile(self, subjects: Sequence[Subject]) -> None:
        """A few steps of each plan under the profiler, after the clock has stopped for good."""
        job = self.job
        if not job.profile_steps:
            return
        first = 1 + job.warmup + job.rounds
        folder = _broadcast_bytes(job.traces.encode(), self.context).decode()
        if self.take_turns:
            for subject in subjects:
                subject.park()
        for label, subject in zip(job.labels, subjects, strict=False):
            self._note(f'profile of "{label}"')
            if self.take_turns:
                subject.unpark()
            batches = [
                self._micro_batches(self.batches, first + step) for step in range(WARM_UP + job.profile_steps)
            ]
            subject.profiled_steps(str(Path(folder) / folder_name(label)), batches)
            if self.take_turns:
                subject.park()
            self._advance(f"profiled {label}", label)
        if self.take_turns:
            for subject in subjects:
                subject.unpark()

    def _on_timed(self, round_: int, index: int, seconds: float) -> None:
        label = self.labels[index]
        self._note(f"round {round_ + 1} of {self.job.rounds}, after {label}")
        self._advance(f"round {round_ + 1} of {self.job.rounds}", label, round_, seconds)

    def _micro_batches(self, batches: Batches, step: int) -> MicroBatches:
        """This rank's part of a step's global batch, cut into micro-batches; on the host, where routes are computed."""
        place = _data_place(self.mesh)
        part = batches.at(step).slice(place, self.shape.data_parallel)
        count = self.job.settings.accumulation
        cut = [part.slice(index, count) for index in range(count)]
        return [(micro.ids_BS, micro.labels_BS) for micro in cut]

    def _replicated(self, subjects: Sequence[Subject], what: str) -> tuple[Finding, ...]:
        found: tuple[Finding, ...] = ()
        for label, subject in zip(self.labels, subjects, strict=True):
            if not subject.is_parked:
                group = self.mesh.get_group(TENSOR_AXIS)
                found += disagreements(
                    f"{label}: {what}", replicated_parameters(subject.model).items(), group
                )
        return found

    def _record(self, index: int, subject: Subject, agreements: dict[str, Agreement]) -> RankRecord:
        assert subject.memory is not None
        return RankRecord(
            label=self.labels[index],
            repeats=self.repeats[index],
            plan_name=subject.plan.name,
            plan_toml=subject.plan.to_toml(),
            engine=str(subject.plan.engine),
            step_s=tuple(subject.step_s),
            losses=tuple(subject.losses),
            gradient_norms=tuple(subject.gradient_norms),
            memory=subject.memory,
            traffic=subject.traffic,
            sent_bytes=subject.sent_bytes,
            module=self.job.module,
            module_forward_s=tuple(subject.module_forward_s),
            module_backward_s=tuple(subject.module_backward_s),
            agreement=agreements.get(self.repeats[index] or self.labels[index]),
        )

    def _notes(self) -> list[str]:
        found = []
        if self.job.check_layers and self.job.check_layers < self.spec.config.n_layers:
            found.append(
                f"The check against the unsharded model ran on {self.job.check_layers} of {self.spec.config.n_layers} layers at full width: "
                "the whole model unsharded would not fit here."
            )
        return found

    def _note(self, text: str) -> None:
        self.context.note(text)

    def _advance(
        self, text: str, label: str, round_: int | None = None, seconds: float | None = None
    ) -> None:
        self.done += 1
        if self.context.rank == 0:
            self.context.report(
                msgspec.json.encode(Progress(self.done, self.total, text, label, round_, seconds))
            )


def rank_variables() -> tuple[tuple[str, str], ...]:
    """Environment variables of this rank that bear on its times."""
    return tuple((name, os.environ[name]) for name in VARIABLES if name in os.environ)


def check_sequence(seq: int, tp: int) -> int:
    """Tokens per sequence of the check: a multiple of tp, as sequence parallelism needs."""
    return min(seq, max(tp, CHECK_TOKENS // tp * tp))


def _data_place(mesh: DeviceMesh) -> int:
    """Which part of the global batch this rank sees."""
    place = 0
    for name in mesh.mesh_dim_names or ():
        if sees_other_tokens(name):
            place = place * mesh[name].size() + mesh.get_local_rank(name)
    return place


def folder_name(label: str) -> str:
    """A plan's folder among the traces: its label without what a file name can't have."""
    return re.sub(r"[^A-Za-z0-9@._-]+", "-", label).strip(".-") or "plan"


def _broadcast(body: bytes, context: RankContext) -> TokenStream:
    """Rank 0's token stream on every rank."""
    return TokenStream.from_bytes(_broadcast_bytes(body, context))


def _broadcast_bytes(body: bytes, context: RankContext) -> bytes:
    """Rank 0's bytes on every rank."""
    size = torch.tensor(len(body), dtype=torch.int64, device=context.device)
    dist.broadcast(size, 0)
    content = torch.empty(int(size.item()), dtype=torch.uint8, device=context.device)
    if context.rank == 0:
        content.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    dist.broadcast(content, 0)
    return content.cpu().numpy().tobytes()
