"""Training: what is asked of a run beyond its step, what a checkpoint says of itself, a line of the run's
log, and the answer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from shardwise.core.errors import OptionError
from shardwise.core.option import Option, check_options

LENGTH, OPTIMIZER, KEPT, WATCHED = "Length and data", "Optimizer", "Checkpoints", "Proof and watching"


BY_SAVE, BY_PROFILER = "a save", "the profiler"
"""What may run beside a step: StepRecord.beside."""


class Decay(StrEnum):
    """How the learning rate falls after its warm-up: along half a cosine, along a line, or not at all."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What only train knows. The batch, the peak learning rate and the norm for clipping are the step's."""

    steps: Annotated[int, Option("Optimizer steps of the whole run.", LENGTH, 1)] = 1000
    validate_every: Annotated[
        int, Option("Steps between two looks at the held-out text; 0 for none.", LENGTH, 0)
    ] = 100
    held_out: Annotated[
        int, Option("Sequences at the text's end that are never trained on, for validation.", LENGTH, 0)
    ] = 64
    until: Annotated[
        float | None,
        Option(
            "End once the loss on the held-out text is no more than this; exit code 1 where it never is.",
            LENGTH,
            0,
        ),
    ] = None
    decay: Annotated[
        str,
        Option(
            "How the learning rate falls after the warm-up: cosine, linear, or constant.",
            OPTIMIZER,
            choices=tuple(Decay),
        ),
    ] = Decay.COSINE.value
    warmup: Annotated[
        int, Option("Steps in which the learning rate rises from 0 along a line.", OPTIMIZER, 0)
    ] = 0
    decay_steps: Annotated[
        int | None,
        Option(
            "The last steps of the run, in which the learning rate falls; before them it is constant.",
            OPTIMIZER,
            0,
            shown="all after the warm-up",
        ),
    ] = None
    last_learning_rate: Annotated[
        float, Option("What the learning rate falls to, as a share of --learning-rate.", OPTIMIZER, 0, 1)
    ] = 0.1
    weight_decay: Annotated[
        float,
        Option("AdamW's, of parameters with two dims or more; biases and norms have none.", OPTIMIZER, 0),
    ] = 0.1
    beta1: Annotated[float, Option("AdamW's decay of the mean of gradients.", OPTIMIZER, 0, 1)] = 0.9
    beta2: Annotated[float, Option("AdamW's decay of the mean of their squares.", OPTIMIZER, 0, 1)] = 0.95
    eps: Annotated[float, Option("AdamW's, beside the root of the squares.", OPTIMIZER, 0)] = 1e-8
    save_every: Annotated[
        int, Option("Steps between two checkpoints; 0 for one at the end only.", KEPT, 0)
    ] = 100
    keep: Annotated[int, Option("Checkpoints that are kept, the newest ones.", KEPT, 1)] = 3
    resume: Annotated[
        bool, Option("Go on from the newest published checkpoint of --out, on this mesh or another.", KEPT)
    ] = False
    restarts: Annotated[
        int,
        Option(
            "How often the ranks are started anew from the last published checkpoint after one has died or "
            "hangs; torchrun has its own --max-restarts.",
            KEPT,
            0,
        ),
    ] = 3
    weights: Annotated[
        str | None,
        Option(
            "A folder of safetensors files to begin with, in the names of --model hf:...; else random ones.",
            KEPT,
        ),
    ] = None
    write_weights: Annotated[
        str | None,
        Option("A new folder for the last weights, as transformers' from_pretrained() takes it.", KEPT),
    ] = None
    compile: Annotated[
        str | None,
        Option(
            "Compile each layer by this backend of torch.compile, such as inductor; none by default.", LENGTH
        ),
    ] = None
    verify: Annotated[
        bool, Option("Before step 1, prove the plan on a small twin of the model, on real ranks.", WATCHED)
    ] = True
    predict: Annotated[
        bool, Option("Before step 1, say what a step will take on --machine, and watch it.", WATCHED)
    ] = True
    alike_every: Annotated[
        int,
        Option(
            "Steps between two checks that ranks hold alike what they must: weights, ids, random state; 0 "
            "for none.",
            WATCHED,
            0,
        ),
    ] = 100
    slower: Annotated[
        float,
        Option(
            "Tell when steps take this share longer than they did, or than was predicted; 0 for never.",
            WATCHED,
            0,
        ),
    ] = 0.3
    profile_every: Annotated[
        int,
        Option(
            "Record one step of so many on all ranks, and say which rank was late in it, and in what; 0 for "
            "none.",
            WATCHED,
            0,
        ),
    ] = 0
    keep_profiles: Annotated[int, Option("Profiles that are kept, the newest ones.", WATCHED, 1)] = 3
    tensorboard: Annotated[
        bool, Option("Write the loss and all that is measured for TensorBoard too.", WATCHED)
    ] = False
    timeout: Annotated[
        float, Option("Seconds without any sign of life after which the ranks are ended as hung.", WATCHED, 5)
    ] = 300.0

    def __post_init__(self) -> None:
        check_options(self)
        if self.until is not None and not (self.validate_every and self.held_out):
            raise OptionError(
                f"--until {self.until:g}: needs the loss on held-out text. Use --validate-every and "
                "--held-out of 1 or more."
            )
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise OptionError(f"--{name} is {getattr(self, name):g}. Use 0 or more, and less than 1.")
        if self.warmup + (self.decay_steps or 0) > self.steps:
            raise OptionError(
                f"--warmup {self.warmup} and --decay-steps {self.decay_steps or 0} are more than the run's "
                f"--steps {self.steps}. Use fewer, or more steps."
            )
        if self.profile_every == 1:
            raise OptionError(
                "--profile-every 1: the step before each recorded one warms the profiler up. Use 2 or more, "
                "or 0 for none."
            )
        if self.decay == Decay.CONSTANT and self.decay_steps:
            raise OptionError(
                f"--decay constant with --decay-steps {self.decay_steps}: a constant rate doesn't fall. Use "
                f"--decay {Decay.LINEAR} or {Decay.COSINE}, or leave --decay-steps out."
            )

    def share_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of the peak.

        step s of n, warm-up w, falling over the last d steps to the share e: (s + 1) / w while it rises; 1 in
        between; then e + (1 - e) (1 - t) for a line and e + (1 - e) (1 + cos(pi t)) / 2 for a cosine
        (Loshchilov and Hutter, SGDR, equation 5), with t = (s - (n - d) + 1) / d, so that the last step has
        e.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        falling = self.steps - self.warmup if self.decay_steps is None else self.decay_steps
        begin = self.steps - falling
        if self.decay == Decay.CONSTANT or step < begin:
            return 1.0
        done = min(1.0, (step - begin + 1) / falling)
        left = (1 + math.cos(math.pi * done)) / 2 if self.decay == Decay.COSINE else 1 - done
        return self.last_learning_rate + (1 - self.last_learning_rate) * left


Value = str | int | float | bool | list[str] | None


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint says of itself.

    step: optimizer steps that were done; position: sequences that were read, over all epochs. data: digest of
    the tokens that position counts in. case: what was asked, by key. versions: of the packages that wrote it.
    parameters: how many elements the model has. world_size: ranks that wrote it.
    """

    step: int
    position: int
    data: str
    case: dict[str, Value]
    versions: dict[str, str]
    parameters: int
    world_size: int

    def __post_init__(self) -> None:
        for name in ("step", "position", "parameters"):
            if getattr(self, name) < 0:
                raise OptionError(f"checkpoint: {name} is {getattr(self, name)}. It can't be below 0.")
        if self.world_size < 1:
            raise OptionError(f"checkpoint: world_size is {self.world_size}. It is 1 or more.")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of a run, a line of steps.jsonl. What wasn't measured is None.

    step: from 1. position: sequences read after it. loss: the global batch's mean, in nats; gradient_norm:
    before clipping. seconds: of the whole step on the slowest rank; data_s: of it, waiting for the batch.
    held_bytes: the most that a rank held since the run began. validation_loss: over all that is held out.
    data_rank: the rank that waited longest for the batch. phases_s: how long the step was in each phase on
    the rank on which that took longest, where the host computes. beside: what ran beside the step and may
    have slowed it: "a save" or "the profiler". ended_at: when, by the first rank's clock, in seconds since
    1970 (UTC).
    """

    step: int
    position: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    data_s: float
    tokens: int
    held_bytes: int | None = None
    validation_loss: float | None = None
    data_rank: int | None = None
    phases_s: Mapping[str, float] | None = None
    beside: str | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class Validated:
    """The loss on the held-out text after a step, in nats."""

    step: int
    loss: float


class Ended(StrEnum):
    """How a run ended: all its steps are done; it was asked to stop, and has saved; or nothing was trained,
    for its plan isn't right or doesn't fit."""

    DONE = "done"
    STOPPED = "stopped"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Restart:
    """Ranks that were started anew. why: the line that ended them; step: the last one that they had told, 0
    for none."""

    why: str
    step: int


@dataclass(frozen=True, slots=True)
class Training:
    """A run and how it ended.

    first_step: done before this call, by the checkpoint that it went on from. predicted_s: a step's, by the
    machine file; None where nothing was predicted. step_s: the median of this call's steps but for those
    beside the profiler. told: what the user must know, in lines. checkpoints: the folder. until: the loss on
    held-out text that was to be reached. first_step_s: from the begin of this call to the end of its first
    step, proof and start of ranks included. unsaved: why the last step has no checkpoint, where it has none.
    """

    model: str
    parameters: int
    mesh: str
    plan: str
    device: str
    steps: int
    first_step: int
    ended: Ended
    last: StepRecord | None
    validated: tuple[Validated, ...]
    curve: tuple[tuple[int, float], ...]
    step_s: float | None
    tokens_per_s: float | None
    predicted_s: float | None
    machine: str | None
    restarts: tuple[Restart, ...]
    told: tuple[str, ...]
    checkpoints: str
    seconds: float
    until: float | None = None
    first_step_s: float | None = None
    unsaved: str | None = None
    schema_version: int = 1


def is_reached(run: Training) -> bool:
    """Whether the loss on held-out text came down to what was asked; true where nothing was."""
    return run.until is None or any(each.loss <= run.until for each in run.validated)


def differences(before: Saved, now: Saved) -> Iterator[tuple[str, str]]:
    """What was asked otherwise when a checkpoint was made: a key, and both values in words."""
    for key in sorted(before.case.keys() | now.case.keys()):
        old, new = before.case.get(key), now.case.get(key)
        if old != new:
            yield key, f"was {_shown(old)}, is {_shown(new)}"


def _shown(value: Value) -> str:
    if value is None:
        return "not given"
    return " ".join(value) if isinstance(value, list) else str(value)
