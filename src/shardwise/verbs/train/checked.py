"""A run of training, checked as far as that goes without ranks, proved and predicted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.core.beside import PredictedStep
from shardwise.core.case import Case
from shardwise.core.errors import OptionError
from shardwise.core.mesh import RUN, Mesh, check_carried
from shardwise.core.pace import Pace
from shardwise.core.prediction import Filling
from shardwise.core.program import OpKind, Phase
from shardwise.core.training import Ended, Saved, StepRecord, TrainOptions, Value
from shardwise.core.verification import Verdict
from shardwise.verbs.checks import (
    check_fsdp,
    check_recompute,
    check_router_decides,
    check_seq,
    check_stages,
    default_plan,
)
from shardwise.verbs.compare_checks import check_fit
from shardwise.verbs.dealing import with_dealt_layers
from shardwise.verbs.predict import MACHINE, PredictOptions, predict
from shardwise.verbs.progress import Progress, silent
from shardwise.verbs.train.live import Live
from shardwise.verbs.train.profiles import PROFILES
from shardwise.verbs.train.scalars import check_installed
from shardwise.verbs.verify import VerifyOptions, verify

if TYPE_CHECKING:
    from shardwise.core.plan import AnyPlan
    from shardwise.models.source import ModelSource
    from shardwise.text.shards import Shards
    from shardwise.text.stream import TokenStream
    from shardwise.train.loop import Result

BATCH, SEQ = 8, 256
CHECKPOINTS = "checkpoints"
_BESIDE = frozenset(
    (
        "resume",
        "restarts",
        "until",
        "timeout",
        "slower",
        "profile_every",
        "keep_profiles",
        "tensorboard",
        "verify",
        "predict",
        "machine",
        "device",
        "weights",
        "write_weights",
    )
)
"""Keys that change nothing of what is trained from a checkpoint on."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A step by the machine file. fits: in its memory. peak_s: what the model's matmuls and attention would
    take at the machine's peak; None where stages share them out. A backward counts as two forwards, and what
    is recomputed not at all (Chowdhery et al. 2022, PaLM, appendix B). step: line by line, for what is
    recorded."""

    machine: str
    step_s: float
    fits: bool
    peak_s: float | None
    step: PredictedStep


@dataclass(frozen=True, slots=True)
class Run:
    """parameters: of the whole model. data: digest of the tokens."""

    case: Case
    options: TrainOptions
    source: "ModelSource"
    plan: "AnyPlan"
    label: str
    parameters: int
    device_type: str
    tokens: "TokenStream | Shards"
    data: str
    forecast: Forecast | None = None

    @classmethod
    def checked(cls, case: Case, options: TrainOptions, progress: Progress = silent) -> "Run":
        """Raises InputError for what can't begin."""
        import torch

        from shardwise.launch.environment import device_type
        from shardwise.models.source import find_model, vocab_size_of
        from shardwise.parallel.plans import load_plans
        from shardwise.text.reading import tokens_of
        from shardwise.text.samples import Samples

        source, mesh = find_model(case.model), case.mesh
        check_carried(mesh, "train", RUN)
        check_fsdp(case)
        check_router_decides(case)
        step = replace(case.step, batch=case.step.batch or BATCH, seq=case.step.seq or SEQ)
        check_seq(step.seq, source)
        plans = case.plans[:1] or (default_plan(source),)
        ((label, plan),) = load_plans(
            plans,
            sequence_parallel=case.sequence_parallel,
            context_attention=case.context_attention,
            family=source.family,
        )
        case = replace(case, step=step, plans=plans)
        case = with_dealt_layers(case, source, plan, case.machine or MACHINE, silent)
        check_stages(case, source)
        check_recompute(case, source)
        model = source.build(dtype=getattr(torch, step.dtype))
        device = device_type(case.device, mesh.world_size)
        check_fit(source, model, [plan], case, device, repeat=False)
        _check_weights(source, options)
        if options.tensorboard:
            check_installed()
        if options.compile is not None:
            _check_compiler(options.compile)
        progress("reading text")
        tokens = tokens_of(case.text, vocab_size_of(model), step.seed, progress)
        samples = Samples.of(tokens, step.seq, step.seed, options.held_out, case.text.documents)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(case, options, source, plan, label, parameters, device, tokens, samples.digest)

    def proved(self, progress: Progress) -> tuple[str, ...]:
        """Why the plan doesn't train the right model, in lines; none where it is proved on a small twin."""
        answers = verify(self.case, VerifyOptions(), progress).verifications
        return tuple(
            f"{self.label}: {finding.subject}: {finding.reason}"
            for answer in answers
            if answer.verdict.is_no and answer.verdict is not Verdict.NEARLY_NOTHING
            for finding in answer.findings
        )

    def machine_of_another_kind(self) -> str | None:
        """Why the case's machine says nothing of this run, in a line; None where it does."""
        from shardwise.predict.machines import load_machine

        assert self.case.machine is not None
        machine = load_machine(self.case.machine)
        if machine.device == self.device_type:
            return None
        return (
            f"The step isn't predicted: {machine.name} is a machine for {machine.device}, and this runs on "
            f"{self.device_type}."
        )

    def predicted(self, progress: Progress) -> "Run":
        """With the forecast of a step on the case's machine."""
        filled = PredictOptions(filled=Filling.WHOLE.value)  # as step/build.py does it
        found = predict(self.case, filled, progress)
        (prediction,), program = found.answer.predictions, found.steps[0].layout.program
        peak_s, rate = None, found.machine.matmul(self.case.step.computed_dtype)
        if rate is not None and self.case.mesh.stages == 1:
            forward = sum(
                op.flops
                for op in program.ops()
                if op.phase is Phase.FORWARD and op.kind in (OpKind.MATMUL, OpKind.ATTENTION)
            )
            peak_s = 3 * forward * self.case.step.accumulation / rate.peak_flops
        ((_, step),) = found.line_by_line()
        forecast = Forecast(prediction.machine, prediction.step_s, prediction.memory.fits, peak_s, step)
        return replace(self, forecast=forecast)

    def saved(self) -> Saved:
        """What a checkpoint of step 0 says."""
        return Saved(
            step=0,
            position=0,
            data=self.data,
            case={key: _plain(value) for key, value in self._asked().items()},
            versions={name: version(name) for name in ("shardwise", "torch")},
            parameters=self.parameters,
            world_size=self.case.mesh.world_size,
        )

    def _asked(self) -> dict[str, object]:
        from shardwise.core.option import options_of

        own: dict[str, object] = {"plans": self._plan_in_short()}
        own |= {asked.key: getattr(self.options, asked.field) for asked in options_of(TrainOptions)}
        return {key: value for key, value in (self.case.values() | own).items() if key not in _BESIDE}

    def _plan_in_short(self) -> tuple[str, ...]:
        """Its name, and a digest of its rules: a file may have changed."""
        from shardwise.parallel.any_plan import text_of

        return self.label, blake2b(text_of(self.plan).encode(), digest_size=4).hexdigest()

    def live(self, record: StepRecord) -> Live:
        """A step beside what was predicted of it."""
        forecast = self.forecast
        if forecast is None:
            return Live(record, self.options.steps)
        mfu = forecast.peak_s / record.seconds if forecast.peak_s is not None else None
        return Live(record, self.options.steps, forecast.step_s, mfu)

    def pace(self) -> Pace | None:
        """That watches the steps of one start of the ranks; None where nobody wants it."""
        share, forecast = self.options.slower, self.forecast
        if not share:
            return None
        return Pace(share) if forecast is None else Pace(share, forecast.step_s, forecast.machine)

    def launch(
        self, folder: Path, resume: bool, on_event: Callable[[bytes], None], recorded: int = 0
    ) -> "Result":
        """Runs the ranks once; rank 0's answer. recorded: see TrainJob. Raises what run_ranks does."""
        import msgspec

        from shardwise.launch import is_main, run_ranks
        from shardwise.launch.environment import threads_per_rank
        from shardwise.parallel.any_plan import text_of
        from shardwise.train.loop import Result, TrainJob
        from shardwise.verbs.train.ranks import pack

        case = self.case
        job = TrainJob(
            model=case.model,
            mesh=str(case.mesh),
            plan=text_of(self.plan),
            settings=case.step,
            options=replace(self.options, resume=resume),
            saved=self.saved(),
            checkpoints=str(folder / CHECKPOINTS),
            profiles=str(folder / PROFILES),
            documents=case.text.documents,
            recorded=recorded,
        )
        results = run_ranks(
            "shardwise.verbs.train.ranks:run",
            pack(job, self.tokens),
            world_size=case.mesh.world_size,
            device_type=self.device_type,
            timeout_s=self.options.timeout,
            on_event=on_event,
            threads_per_rank=threads_per_rank(case.mesh.world_size),
            can_stop=True,
        )
        if not is_main():
            return Result(Ended.DONE, self.options.steps)  # rank 0 tells how it was
        return msgspec.json.decode(results[0], type=Result)


def _check_weights(source: "ModelSource", options: TrainOptions) -> None:
    """Raises InputError for weights to read or write that can't be."""
    from shardwise.models.hugging_face import HuggingFaceModel
    from shardwise.train.weights.reading import files_of

    for flag, folder in (("--weights", options.weights), ("--write-weights", options.write_weights)):
        if folder is not None and not isinstance(source, HuggingFaceModel):
            raise OptionError(
                f"{flag} {folder}: {source.name} isn't a Hugging Face model, so its weights have no names "
                "there. Use --model hf:PATH, or leave it out: checkpoints hold them too."
            )
    if options.weights is not None:
        files_of(Path(options.weights))
    if options.write_weights is not None and Path(options.write_weights).exists():
        raise OptionError(f"--write-weights {options.write_weights}: is there already. Name another folder.")


def _check_compiler(backend: str) -> None:
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptionError(f"--compile {backend}: torch.compile has no such backend. Use {', '.join(known)}.")


def _plain(value: object) -> Value:
    """As JSON has it."""
    if isinstance(value, Mesh):
        return str(value)
    if isinstance(value, tuple):
        return [str(each) for each in value]
    assert value is None or isinstance(value, str | int | float | bool), value
    return value
