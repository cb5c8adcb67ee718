"""train: a case and options -> Training: the step that is proved and predicted, run on text until it is done,
with checkpoints, through the failures of its ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from shardwise.core.case import Case
from shardwise.core.errors import DriftError, NotFiniteError, RunError
from shardwise.core.pace import Pace
from shardwise.core.training import BY_PROFILER, Ended, Restart, StepRecord, Training, TrainOptions, Validated
from shardwise.files.document import settings_document, write_document
from shardwise.files.run_folder import RunFolder
from shardwise.files.step_log import StepLog, read_steps
from shardwise.verbs.progress import Progress, silent
from shardwise.verbs.train.checked import BATCH, CHECKPOINTS, SEQ, Run
from shardwise.verbs.train.live import Live
from shardwise.verbs.train.profiles import PREDICTED, PROFILES, Profiles
from shardwise.verbs.train.scalars import TENSORBOARD, Scalars

if TYPE_CHECKING:
    from shardwise.train.loop import Result

__all__ = ["BATCH", "SEQ", "Live", "train"]
_POINTS = 400
_UNPROVED = "The plan was not proved (--no-verify): most wrong gradients show in no loss curve."


def train(
    case: Case,
    options: TrainOptions | None = None,
    progress: Progress = silent,
    *,
    open_folder: Callable[[bool], RunFolder],
    on_step: Callable[[Live], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
    is_restart: bool = False,
) -> Training | None:
    """Starts the mesh's ranks on this machine, again after a failure, or uses torchrun's: its other ranks get
    None. What needs no ranks is checked first, as InputError; then the plan is proved on a small twin, and
    predicted.

    open_folder: called once all is checked, with whether the run goes on; the folder gets steps.jsonl and
    checkpoints/. on_step: called with each step. tell: with lines that the user must see at once.
    is_restart: the job goes on after a failure: from step 1 where that came before the first checkpoint.
    Raises RunError where ranks failed more often than options.restarts since the last checkpoint."""
    from shardwise.launch import from_main, is_main

    options = options or TrainOptions()
    began_s = time.monotonic()
    run = Run.checked(case, options, progress)
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        tell(line)

    if not options.verify:
        say(_UNPROVED)
    run, wrong = _looked_at(run, progress, say)
    if from_main(bool(wrong)):
        return _answer(run, None, Ended.REFUSED, wrong, began_s) if is_main() else None
    if not is_main():
        run.launch(Path(), options.resume, lambda _: None)  # rank 0's job counts
        return None
    with open_folder(options.resume) as folder, _Watched(run, folder, say, on_step, began_s) as watched:
        if not options.resume:
            folder.write("settings.json", settings_document(run.saved()))
        recorded = read_steps(folder.path) if options.resume and not is_restart else []
        result = watched.through_failures(progress, recorded[-1].step if recorded else 0)
    return _answer(run, watched, result.ended, tuple(told), began_s, result.unsaved)


def _looked_at(run: Run, progress: Progress, say: Callable[[str], None]) -> tuple[Run, tuple[str, ...]]:
    """The run with its forecast, and why it must not begin. Of torchrun's ranks only the main one knows."""
    from shardwise.launch import is_main

    options = run.options
    wrong = run.proved(progress) if options.verify and run.case.mesh.world_size > 1 else ()
    if wrong or run.case.machine is None or not options.predict or not is_main():
        return run, wrong
    if (why := run.machine_of_another_kind()) is not None:
        say(why)
        return run, ()
    run = run.predicted(progress)
    assert run.forecast is not None
    if run.forecast.fits:
        return run, ()
    line = (
        f"The step doesn't fit in the memory of {run.forecast.machine}: `shardwise predict` says what takes "
        "it. Change the plan or the step, or leave --machine out."
    )
    return run, (line,)


@dataclass(slots=True)
class _Watched:
    """A run under way, and what its rank 0 reports. began_s: when the call began, by time.monotonic();
    first_step_s: from there to the first step's end. restarts: since its begin; first_step: that this call
    went on from; resumed: the last step that ranks went on from."""

    run: Run
    folder: RunFolder
    say: Callable[[str], None]
    on_step: Callable[[Live], None]
    began_s: float
    resumed: int = 0
    first_step: int | None = None
    first_step_s: float | None = None
    _broken: RunError | None = None
    restarts: list[Restart] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    _log: StepLog | None = None
    _pace: Pace | None = None
    _scalars: Scalars | None = None
    _profiles: Profiles = field(init=False)

    def __post_init__(self) -> None:
        keep, ranks = self.run.options.keep_profiles, self.run.case.mesh.world_size
        folder = self.folder.path.resolve()
        is_beside = self.run.forecast is not None and self.run.options.profile_every
        beside = folder / PREDICTED if is_beside else None
        self._profiles = Profiles(folder / PROFILES, keep, ranks, beside)

    def _write_forecast(self) -> None:
        """What profiles are laid beside."""
        forecast = self.run.forecast
        if forecast is not None and self.run.options.profile_every:
            self.folder.write(f"{PREDICTED}/step-a.json", write_document(forecast.step))
            self.folder.write(f"{PREDICTED}/settings.json", settings_document({"plans": [self.run.label]}))

    def through_failures(self, progress: Progress, recorded: int) -> "Result":
        """Runs the ranks, and again from the last checkpoint where they fail. recorded: see TrainJob; ranks
        that are started again may begin again."""
        from shardwise.launch import Interrupted, joined

        options, tries, published = self.run.options, 0, self._published()
        resume = options.resume
        while True:
            progress(f"starting {self.run.case.mesh.world_size} ranks")
            try:
                result = self.run.launch(self.folder.path.resolve(), resume, self._take, recorded)
            except (DriftError, NotFiniteError, Interrupted):
                raise  # the same would come again
            except RunError as error:
                before, published = published, self._published()
                tries = tries + 1 if published == before else 1
                if error is self._broken or joined() or tries > options.restarts:
                    raise
                resume, recorded = True, 0
                self.restarts.append(Restart(str(error), self._last_step()))
                self.say(f"{error} Starting again from the last checkpoint.")
            else:
                self._tell_profiles(wait=True)
                return result

    def _published(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        from shardwise.train.checkpoints import find

        found = find(self.folder.path / CHECKPOINTS, full=False)
        return found.manifest.saved.step if found.manifest is not None else 0

    def _last_step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    def _take(self, content: bytes) -> None:
        import msgspec

        from shardwise.train.loop import Event

        event = msgspec.json.decode(content, type=Event)
        if event.told is not None:
            self.say(event.told)
        if event.began and self.first_step_s is None:
            self.first_step_s = time.monotonic() - self.began_s
        if event.resumed is not None:
            self._begin(event.resumed)
        if event.record is not None:
            if self._log is None:
                self._begin(0)
            assert self._log is not None
            try:
                self._log.append(event.record)
            except RunError as error:
                self._broken = error  # ranks that are started again would meet it again
                raise
            self.steps.append(event.record)
            live = self.run.live(event.record)
            self.on_step(live)
            self._write_scalars(live)
            if self._pace is not None and (slower := self._pace.take(event.record)) is not None:
                self.say(slower)
        if event.profiled is not None:
            self._profiles.read(event.profiled)
        self._tell_profiles()

    def _write_scalars(self, live: Live) -> None:
        if self._scalars is None:
            return
        try:
            self._scalars.write(live)
        except OSError as error:
            self._scalars = None
            self.say(f"TensorBoard gets no more scalars: {error.strerror or error}. The run goes on.")

    def _tell_profiles(self, *, wait: bool = False) -> None:
        for line in self._profiles.lines(wait=wait):
            self.say(line)

    def _begin(self, step: int) -> None:
        """Ranks go on after a step."""
        self._close()
        if self.first_step is None:
            self._write_forecast()  # not before ranks go on: one that is refused changes no file
        self.resumed = step
        self.steps = [record for record in self.steps if record.step <= step]
        if self.first_step is None:
            self.first_step = step
        self._log = StepLog(self.folder.path, step)
        self._pace = self.run.pace()
        if self.run.options.tensorboard:
            self._scalars = Scalars(self.folder.path / TENSORBOARD, step)

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._profiles.__exit__(None, None, None)


def _answer(
    run: Run,
    watched: _Watched | None,
    ended: Ended,
    told: tuple[str, ...],
    began_s: float,
    unsaved: str | None = None,
) -> Training:
    steps = watched.steps if watched is not None else []
    every = read_steps(watched.folder.path) if watched is not None else []
    counted = [record.seconds for record in steps if record.beside != BY_PROFILER]
    counted = counted or [record.seconds for record in steps]
    step_s = median(counted) if counted else None
    validated = [
        Validated(each.step, each.validation_loss) for each in every if each.validation_loss is not None
    ]
    stride = max(1, -(-len(every) // _POINTS))
    return Training(
        model=run.source.name,
        parameters=run.parameters,
        mesh=str(run.case.mesh),
        plan=run.label,
        device=run.device_type,
        steps=run.options.steps,
        first_step=(watched.first_step or 0) if watched is not None else 0,
        ended=ended,
        last=every[-1] if every else None,
        validated=tuple(validated),
        curve=tuple((each.step, each.loss) for each in every[::stride]),
        step_s=step_s,
        tokens_per_s=run.case.step.tokens / step_s if step_s else None,
        predicted_s=run.forecast.step_s if run.forecast is not None else None,
        machine=run.forecast.machine if run.forecast is not None else None,
        restarts=tuple(watched.restarts) if watched is not None else (),
        told=told,
        checkpoints=str(watched.folder.path / CHECKPOINTS) if watched is not None else "",
        seconds=time.monotonic() - began_s,
        until=run.options.until,
        first_step_s=watched.first_step_s if watched is not None else None,
        unsaved=unsaved,
    )
