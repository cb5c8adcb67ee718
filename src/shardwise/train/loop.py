"""What one rank of `shardwise train` does: the step that is proved and predicted, again and again, on the
text from one position on; checkpoints, validation and a line for each step beside it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import FrameType

import msgspec
import torch

from shardwise.core.batch_part import coordinate, part_of_batch
from shardwise.core.case import StepSettings
from shardwise.core.errors import DriftError, NotFiniteError, OptionError
from shardwise.core.mesh import STAGES_AXIS, Mesh
from shardwise.core.program import Phase
from shardwise.core.training import BY_PROFILER, BY_SAVE, Ended, Saved, StepRecord, TrainOptions, differences
from shardwise.launch import RankContext
from shardwise.measure.memory import most_held_bytes
from shardwise.models.source import find_model
from shardwise.parallel.any_plan import plan_from
from shardwise.step.build import device_mesh, model_of_step
from shardwise.step.portion import Portion
from shardwise.step.train import StepResult, TrainStep, adamw
from shardwise.text.samples import Samples
from shardwise.train.checkpoints import Checkpoints
from shardwise.train.clock import PHASES, Clock
from shardwise.train.feed import Feed
from shardwise.train.finite import check, guarded
from shardwise.train.pulse import Beat, Pulse
from shardwise.train.recorded import Recorded
from shardwise.train.whereabouts import Whereabouts
from shardwise.watch.sentinel import Sentinel, watch


@dataclass(frozen=True, slots=True)
class TrainJob:
    """All that a rank needs to know, beside the tokens. plan: TOML text. saved: what a checkpoint of step 0
    would say. checkpoints, profiles: folders, the latter for options.profile_every.
    documents: how they meet in a sequence. recorded: the last step of which a line is lost where a run that
    goes on has no checkpoint, and begins again: refused; 0 where it may."""

    model: str
    mesh: str
    plan: str
    settings: StepSettings
    options: TrainOptions
    saved: Saved
    checkpoints: str
    documents: str
    profiles: str = ""
    recorded: int = 0


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What rank 0 reports, one thing at a time. resumed: the step of the checkpoint that it goes on from.
    began: the first step of these ranks is done. profiled: a step whose profile all ranks have written."""

    record: StepRecord | None = None
    began: bool = False
    told: str | None = None
    resumed: int | None = None
    profiled: int | None = None


class Result(msgspec.Struct, frozen=True):
    """A rank's answer. unsaved: why the last step has no checkpoint, where it has none."""

    ended: Ended
    step: int
    unsaved: str | None = None


class Loop:
    """samples: the tokens, alike on all ranks."""

    def __init__(self, context: RankContext, job: TrainJob, samples: Samples) -> None:
        self._context, self._job, self._samples = context, job, samples
        settings = job.settings
        mesh = Mesh.parse(job.mesh)
        options = job.options
        context.note("building the model")
        self._mesh = device_mesh(mesh, context.device.type)
        self._portion = Portion.on(self._mesh, settings.accumulation, reduce_once=settings.reduce_once)
        self._source = find_model(job.model)
        self._model = model_of_step(
            self._source,
            plan_from(job.plan),
            self._mesh,
            settings,
            device=context.device,
            compiler=options.compile,
        )
        optimizer = adamw(
            self._model,
            learning_rate=settings.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            kernel=settings.optimizer_kernel,
        )
        self._step = TrainStep(
            self._model,
            mesh=self._mesh,
            max_norm=settings.max_norm,
            reduce_once=settings.reduce_once,
            on_phase=self._on_phase,
            optimizer=optimizer,
            check=check,
        )
        self._checkpoints = Checkpoints(Path(job.checkpoints), keep=options.keep, mesh=mesh)
        self._recorded = Recorded(Path(job.profiles), options.profile_every, self._model)
        self._pulse = Pulse()
        self._clock = Clock(host_computes=context.device.type == "cpu")
        self._done = 0
        self._record: StepRecord | None = None
        self._phases_s: tuple[float, ...] = ()
        self._was_saving, self._has_begun = False, False
        self._where: Whereabouts | None = None
        self._stop, self._reached = threading.Event(), False
        torch.manual_seed(own_seed(settings.seed, mesh, context.rank))

    def run(self) -> Result:
        """Trains until all steps are done or a signal asks it to stop; then the last state is saved."""
        options = self._job.options
        with self.opened() as feed:
            while self._done < options.steps and self.advance(feed):
                pass
            self._close_step()
            self._save(feed.position, wait=True)
            outcome = self._checkpoints.finish()
            is_done = self._reached or self._done == options.steps
            if is_done and options.write_weights is not None:
                self._write_weights(Path(options.write_weights))
        unsaved = outcome.why if outcome is not None else None
        return Result(Ended.DONE if is_done else Ended.STOPPED, self._done, unsaved)

    @contextmanager
    def opened(self) -> Iterator[Feed]:
        """All that runs beside the steps, from the checkpoint on that it resumes; ends with the `with`."""
        options = self._job.options
        with ExitStack() as open_now:
            self._where = Whereabouts(
                self._model, self._context.note, names_host=self._context.under_torchrun
            )
            open_now.enter_context(self._where)
            position = self._resumed() if options.resume else 0
            if not self._done and options.weights is not None:
                self._read_weights(Path(options.weights))
            feed = Feed(self._samples, self._portion, self._job.settings.batch, position)
            open_now.enter_context(feed)
            open_now.enter_context(self._signals())
            open_now.enter_context(self._recorded)
            if options.alike_every and self._context.world_size > 1:
                open_now.enter_context(self._watched(options.alike_every))
            yield feed

    def advance(self, feed: Feed) -> bool:
        """A step, with what belongs to it: the line of the one before, validation, a checkpoint. Whether
        nobody was asked to stop."""
        options = self._job.options
        try:
            record = self._one_step(feed)
        except (NotFiniteError, DriftError):
            self._close_step()  # the step before it was all right
            self._phase("saving", is_long=True)
            self._checkpoints.finish()  # and so is what is still being written of it
            raise
        if not self._has_begun:
            self._has_begun = True
            self._report(Event(began=True))
        stops = self._close_step()
        self._begin_close(record)
        is_last = self._done == options.steps
        if options.validate_every and (is_last or self._done % options.validate_every == 0):
            self._validate(feed)
        saves = options.save_every and self._done % options.save_every == 0 and self._done < options.steps
        if saves and not stops:
            # told before the checkpoint counts: who goes on from that doesn't do the step again
            stops = self._close_step()
        if saves and not stops:
            self._save(feed.position)
        return not stops

    def _one_step(self, feed: Feed) -> StepRecord:
        """The next step, and its line as this rank saw it."""
        job, number = self._job, self._done + 1
        rate = job.settings.learning_rate * job.options.share_at(self._done)
        for group in self._step.optimizer.param_groups:
            group["lr"] = rate
        self._phase("waiting for text")
        self._was_saving = self._checkpoints.is_saving
        began = time.perf_counter()
        batch = feed.take()
        data_s = time.perf_counter() - began
        self._clock.begin()
        with self._recorded.step(number):
            result: StepResult = guarded(
                partial(self._step, batch), partial(self._step.gradients, batch), self._model, number
            )
            seconds, self._phases_s = time.perf_counter() - began, self._clock.end()
        self._done = number
        return StepRecord(
            step=number,
            position=feed.position,
            loss=float(result.loss),
            gradient_norm=float(result.gradient_norm),
            learning_rate=rate,
            seconds=seconds,
            data_s=data_s,
            tokens=job.settings.tokens,
            beside=BY_PROFILER if self._recorded.is_beside(number) else None,
            ended_at=time.time(),
        )

    def _begin_close(self, record: StepRecord) -> None:
        """What a step's line still lacks is asked of all ranks, and read once the next step is done."""
        held = most_held_bytes(self._context.device)
        self._record = record
        said = (record.seconds, record.data_s, held or 0, self._stop.is_set(), self._was_saving)
        self._pulse.begin(Beat(*said, self._phases_s))

    def _close_step(self) -> bool:
        """Reports the line of the last step that was begun to be closed; whether anybody was asked to
        stop."""
        beat = self._pulse.end()
        record, self._record = self._record, None
        if beat is None or record is None:
            return False
        whole = replace(
            record,
            seconds=beat.seconds,
            data_s=beat.data_s,
            held_bytes=beat.held_bytes or None,
            data_rank=beat.data_rank,
            phases_s=dict(zip(PHASES.values(), beat.phases_s, strict=True)) if beat.phases_s else None,
            beside=record.beside or (BY_SAVE if beat.saving else None),
        )
        profiled = record.step if self._recorded.was_recorded(record.step) else None
        self._report(Event(record=whole, profiled=profiled, told=self._recorded.problem))
        self._recorded.problem = None
        return beat.stop

    def _validate(self, feed: Feed) -> None:
        held_out, batch = self._samples.held_out, self._job.settings.batch
        if not held_out or self._record is None:
            return
        self._phase("validating")
        total, valid = 0.0, 0
        for first in range(0, held_out, batch):
            loss, count = self._step.loss(feed.held_out(first))
            total, valid = total + float(loss), valid + int(count)
        self._record = replace(self._record, validation_loss=total / valid)
        until = self._job.options.until
        if until is not None and total / valid <= until:
            self._reached = True
            self._stop.set()  # as if a signal had asked: all ranks end after the same step

    def _save(self, position: int, wait: bool = False) -> None:
        self._phase("saving", is_long=True)
        saved = replace(self._job.saved, step=self._done, position=position)
        self._checkpoints.save(self._done, self._model, self._step.optimizer, saved, wait=wait)
        self._tell_lines()

    def _resumed(self) -> int:
        """Takes up the newest whole checkpoint, where there is one; the position to go on from."""
        self._phase("looking for a checkpoint", is_long=True)
        found = self._checkpoints.newest()
        if found.manifest is None and self._job.recorded:
            raise OptionError(_nothing_to_resume(self._job, found.passed_over))
        for line in found.passed_over:
            self._report(Event(told=f"passed over {line}"))
        if found.manifest is None:
            self._report(Event(told=f"{self._job.checkpoints} has no whole checkpoint: begins at step 1"))
            self._report(Event(resumed=0))
            return 0
        check_same_run(found.manifest.saved, self._job.saved)
        if found.manifest.saved.step > self._job.options.steps:
            raise OptionError(
                f"--steps {self._job.options.steps}: the checkpoint is of step {found.manifest.saved.step} "
                "already. Use more, or begin a new run with another --out."
            )
        self._phase(f"restoring {found.path}", is_long=True)
        saved = self._checkpoints.restore(found, self._model, self._step.optimizer)
        for key, change in differences(saved, self._job.saved):
            self._report(Event(told=f"{key} {change}"))
        self._tell_lines()
        self._done = saved.step
        self._report(Event(resumed=saved.step))
        return saved.position

    def _read_weights(self, folder: Path) -> None:
        from shardwise.models.hugging_face import HuggingFaceModel
        from shardwise.train.weights import read_weights

        assert isinstance(self._source, HuggingFaceModel)
        self._phase(f"reading weights of {folder}", is_long=True)
        unused = read_weights(folder, self._model, self._source)
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            named = ", ".join(unused[:3])
            self._report(Event(told=f"{folder} has what this model has no use for: {named}{more}"))

    def _write_weights(self, folder: Path) -> None:
        from shardwise.models.hugging_face import HuggingFaceModel
        from shardwise.train.weights import write_weights

        assert isinstance(self._source, HuggingFaceModel)
        self._phase(f"writing weights to {folder}", is_long=True)
        found = self._checkpoints.newest()
        if found.manifest is None or found.manifest.saved.step != self._done:
            self._report(Event(told=f"no weights were written: step {self._done} couldn't be saved"))
            return
        write_weights(found, self._source, folder)
        self._report(Event(told=f"weights written to {folder}"))

    def _watched(self, every: int) -> Sentinel:
        return watch(self._model, every=every, mesh=self._mesh, optimizer=self._step.optimizer)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM asks this rank to stop once it can; under torchrun, which passes it on, Ctrl-C too."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()

        asks = [signal.SIGTERM, *([signal.SIGINT] if self._context.under_torchrun else [])]
        before = [(number, signal.signal(number, stop)) for number in asks]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _tell_lines(self) -> None:
        for line in self._checkpoints.lines():
            self._report(Event(told=line))

    def _report(self, event: Event) -> None:
        if self._context.rank == 0:
            self._context.report(msgspec.json.encode(event))

    def _on_phase(self, phase: Phase) -> None:
        if phase in PHASES:
            self._clock.enter(phase)
            self._phase(PHASES[phase])

    def _phase(self, text: str, *, is_long: bool = False) -> None:
        if self._where is not None:
            self._where.phase(f"step {self._done + 1}: {text}", is_long=is_long)


def own_seed(seed: int, mesh: Mesh, rank: int) -> int:
    """Of what a rank draws at random while it trains: another one where it sees other tokens or has other
    layers, the same along axes that only cut tensors."""
    part = part_of_batch(mesh, rank)
    place = f"{seed} {part.place} {part.chunks[0]} {coordinate(mesh, rank, STAGES_AXIS)}"
    return int.from_bytes(blake2b(place.encode(), digest_size=7).digest())


def check_same_run(saved: Saved, now: Saved) -> None:
    """Raises OptionError for a checkpoint that counts in other sequences, or is of another model."""
    if saved.data != now.data:
        raise OptionError(
            "--resume: the text is another one than the checkpoint's, so its position means nothing in it. "
            "Give the same text and tokenizer, or begin a new run with another --out."
        )
    for key, change in differences(saved, now):
        if key in FIXED:
            raise OptionError(
                f"--resume: --{key.replace('_', '-')} {change}. A run that goes on keeps it: "
                f"{FIXED[key]}. Give it as it was, or begin a new run with another --out."
            )


def _nothing_to_resume(job: TrainJob, passed_over: tuple[str, ...]) -> str:
    found = f" ({' '.join(passed_over).rstrip('.')})" if passed_over else ""
    return (
        f"--resume: {job.checkpoints} has no whole checkpoint{found}, and steps.jsonl beside it has lines to "
        f"step {job.recorded}, which a run from step 1 on would overwrite. Put a checkpoint back, or begin a "
        "new run with another --out and without --resume. No file was changed."
    )


FIXED = {
    "model": "the weights are that model's",
    "dtype": "weights and the optimizer's state are kept in it",
    "seq": "the position counts sequences of that length",
    "seed": "it decides the order of sequences",
    "held_out": "what is held out for validation must never have been trained on",
}
"""Keys of a case that a run can't change on its way, and why."""
