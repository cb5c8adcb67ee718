"""What is asked of a verb: the model, the mesh, the plans, the training step, the text, the machine. One noun
for all.

Only what one verb knows (rounds, against, ...) is that verb's own. What needs the model (positions,
divisibility) the verb checks. Each field says what it is once: commands make options of it, case files
comments."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from shardwise.core.batch_part import check_batch
from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh
from shardwise.core.option import Asked, Option, Paths, check_options, options_of
from shardwise.core.pipeline import EVEN, Pipeline, Schedule, counts_of
from shardwise.core.plan import ContextAttention, suggest

MODEL, STEP = "Model and mesh", "Training step"
DTYPES = ("float32", "bfloat16", "float64")
RECOMPUTE = ("none", "selective-ops", "full")
PACKED, MASKED = "packed", "masked"
DOCUMENTS = (PACKED, MASKED)
DEVICES = ("auto", "cpu", "cuda")
FUSED, FOREACH, FOR_LOOP = "fused", "foreach", "for-loop"
OPTIMIZER_KERNELS = (FUSED, FOREACH, FOR_LOOP)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The training step that every plan runs: the same data, loss, clipping and optimizer (AdamW).

    batch: sequences per optimizer step over all ranks; accumulation: micro-batches that it is cut into; batch
    and seq are 0 where a verb is to choose. param_dtype, reduce_dtype: FSDP's mixed precision, as PyTorch's
    MixedPrecisionPolicy has it: what parameters are gathered and layers computed in (None: dtype), and what
    gradients are reduced in (None: as computed); shards, their gradients and the optimizer's state stay in
    dtype. reshard_after_forward: whether FSDP gathers a layer's parameters for its forward and its backward
    each; else once, in a pipeline's stage once a step. reduce_once: whether it keeps whole gradients until
    the last micro-batch's backward.
    optimizer_kernel: of OPTIMIZER_KERNELS. recompute_layers: how many layers recompute is for (None: all);
    which ones core/pipeline.py says. expert_load: of a mixture whose router's choice nobody knows, tokens of
    the busiest rank's experts over the mean rank's."""

    batch: Annotated[int, Option("Sequences per optimizer step over all ranks.", STEP, 1)] = 0
    seq: Annotated[int, Option("Tokens per sequence.", STEP, 1)] = 0
    dtype: Annotated[
        str,
        Option(
            f"Of parameters, gradients and optimizer state: {', '.join(DTYPES)}.",
            STEP,
            choices=DTYPES,
            elsewhere=(("float8", "Linears that multiply in it are predict's --matmul-dtype float8."),),
        ),
    ] = "float32"
    param_dtype: Annotated[
        str | None,
        Option(
            "What FSDP gathers parameters in, and layers compute in (MixedPrecisionPolicy).",
            STEP,
            choices=DTYPES,
            shown="the --dtype",
        ),
    ] = None
    reduce_dtype: Annotated[
        str | None,
        Option("What FSDP reduces gradients in.", STEP, choices=DTYPES, shown="what layers compute in"),
    ] = None
    accumulation: Annotated[
        int,
        Option("Micro-batches that a step's batch is cut into.", STEP, 1, shown="1, or a pipeline's stages"),
    ] = 1
    reshard_after_forward: Annotated[
        bool,
        Option(
            "FSDP frees a layer's gathered parameters after its forward, and gathers them again for its "
            "backward; else it keeps them until then, and in a pipeline's stage until its last one.",
            STEP,
        ),
    ] = True
    reduce_once: Annotated[
        bool,
        Option(
            "FSDP reduces gradients once a step, in the last micro-batch's backward, and keeps whole ones "
            "until then; else in each.",
            STEP,
        ),
    ] = False
    recompute: Annotated[
        str,
        Option(
            "Activation checkpointing of each layer: none, selective-ops (all but fused attention and every "
            "second matmul) or full.",
            STEP,
            choices=RECOMPUTE,
        ),
    ] = "none"
    recompute_layers: Annotated[
        int | None,
        Option(
            "How many of the model's layers --recompute is for: the first ones; in a pipeline the same share "
            "of each chunk, its first ones.",
            STEP,
            1,
            shown="all",
        ),
    ] = None
    schedule: Annotated[
        str | None,
        Option(
            "The order in which a pipeline's stages run micro-batches: gpipe, 1f1b, or interleaved.",
            STEP,
            choices=tuple(Schedule),
            shown="1f1b, or interleaved with --chunks",
        ),
    ] = None
    chunks: Annotated[
        int, Option("Of layers that each stage of a pipeline holds: more than 1 is interleaved.", STEP, 1)
    ] = 1
    stages: Annotated[
        str,
        Option(
            "How many layers each stage (or chunk, in the model's order) has: even, balanced by predicted "
            "costs, or counts such as 3,5,5,3.",
            STEP,
        ),
    ] = EVEN
    learning_rate: Annotated[float, Option("AdamW's.", STEP)] = 3e-4
    optimizer_kernel: Annotated[
        str,
        Option(
            "How AdamW runs, as torch.optim.AdamW has it: fused (one kernel for a list of parameters), "
            "foreach (one for each operation on a list), or for-loop (parameter by parameter).",
            STEP,
            choices=OPTIMIZER_KERNELS,
        ),
    ] = FUSED
    max_norm: Annotated[float, Option("Gradients are clipped to this global norm.", STEP)] = 1.0
    seed: Annotated[int, Option("Of the initial weights and of random ids.", STEP, 0)] = 0
    expert_load: Annotated[
        float,
        Option(
            "Of experts that ranks share out, tokens of the busiest rank's over the mean rank's: for explain "
            "and predict, which can't know what a router chooses (compare measures it).",
            STEP,
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        for option, value in (("--learning-rate", self.learning_rate), ("--max-norm", self.max_norm)):
            if not 0 < value < float("inf"):
                raise OptionError(f"{option} is {value}. Use a number above 0.")
        if not 1 <= self.expert_load < float("inf"):
            raise OptionError(f"--expert-load is {self.expert_load:g}. Use 1 (balanced) or more.")
        is_interleaved = self.schedule == Schedule.INTERLEAVED
        if self.schedule is not None and is_interleaved != (self.chunks > 1):
            raise OptionError(
                f"--schedule {self.schedule} and --chunks {self.chunks} don't go together: several chunks "
                f"are what {Schedule.INTERLEAVED} has. Change one of them."
            )
        counts_of(self.stages)
        if self.recompute_layers is not None and self.recompute == "none":
            raise OptionError(
                f"--recompute-layers {self.recompute_layers}: says how many layers --recompute is for. Add "
                f"--recompute {' or '.join(RECOMPUTE[1:])}, or leave it out."
            )

    def pipeline(self, mesh: Mesh) -> Pipeline:
        """Of a mesh's stages."""
        chosen = Schedule.INTERLEAVED if self.chunks > 1 else Schedule.ONE_F_ONE_B
        schedule = Schedule(self.schedule) if self.schedule is not None else chosen
        return Pipeline(mesh.stages, self.chunks, schedule, counts_of(self.stages))

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def computed_dtype(self) -> str:
        """What layers compute in."""
        return self.param_dtype or self.dtype

    @property
    def reduced_dtype(self) -> str:
        """What FSDP reduces gradients in."""
        return self.reduce_dtype or self.computed_dtype

    @property
    def precision(self) -> str:
        """The dtypes in words: "float32", or "float32, computed in bfloat16, reduced in float32"."""
        if self.param_dtype is None and self.reduce_dtype is None:
            return self.dtype
        return f"{self.dtype}, computed in {self.computed_dtype}, reduced in {self.reduced_dtype}"


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where token ids come from: text files or folders, cut by a tokenizer; or uniform random ids. documents:
    what training learns at a document's end: packed: the next one's first token; masked: nothing."""

    files: Annotated[
        tuple[str, ...],
        Option(
            "Your text, .jsonl or .parquet files, or folders; by default Python's own documentation.",
            STEP,
            key="text",
            paths=Paths.ALL,
        ),
    ] = ()
    tokenizer: Annotated[
        str | None,
        Option("Your tokenizer.json; by default one is trained on the text.", STEP, paths=Paths.ALL),
    ] = None
    text_key: Annotated[
        str, Option("Which key or column of .jsonl and .parquet records is their text.", STEP)
    ] = "text"
    end_token: Annotated[
        str | None,
        Option(
            "The tokenizer's token that ends a document.",
            STEP,
            shown="what its tokenizer_config.json says, or its one usual special token",
        ),
    ] = None
    documents: Annotated[
        str,
        Option(
            "At a document's end the next one's first token is learnt (packed), or nothing (masked).",
            STEP,
            choices=DOCUMENTS,
        ),
    ] = PACKED
    random_ids: Annotated[bool, Option("Uniform random ids instead of text.", STEP)] = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.random_ids and (self.files or self.tokenizer is not None):
            raise OptionError(
                "random ids come without text. Leave out the text files and the tokenizer, or the random ids."
            )


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked. plans: as a user names them, the first being what others are held against; none: what
    suits the model. machine: None where a verb is to choose."""

    model: Annotated[
        str,
        Option(
            "A model of `shardwise models`, hf:TYPE, hf:PATH or package.module:factory.",
            MODEL,
            paths=Paths.CONFIG,
        ),
    ]
    mesh: Annotated[Mesh, Option("Axes of ranks: tp, with dp or fsdp before it, such as fsdp=2,tp=2.", MODEL)]
    plans: Annotated[
        tuple[str, ...],
        Option(
            "Built-in plans, .toml files, hf or hf-ep (a Hugging Face model's own), own (the factory shards "
            "itself) or unsharded; the first is what the others are held against.",
            is_argument=True,
            paths=Paths.TOML,
        ),
    ] = ()
    step: StepSettings = StepSettings()
    text: TextSource = TextSource()
    machine: Annotated[
        str | None,
        Option("A machine of `shardwise machines`, or a .toml file of yours.", MODEL, paths=Paths.TOML),
    ] = None
    device: Annotated[
        str, Option("auto, cpu or cuda; auto takes GPUs where there are enough.", MODEL, choices=DEVICES)
    ] = "auto"
    sequence_parallel: Annotated[
        bool, Option("Activations cut along the sequence between blocks.", "Built-in plans")
    ] = True
    context_attention: Annotated[
        str,
        Option(
            "How attention gets all keys of a sequence that cp shares: gather (an all-gather of keys and "
            "values) or ring (they go round).",
            "Built-in plans",
            choices=tuple(ContextAttention),
        ),
    ] = ContextAttention.GATHER.value

    def __post_init__(self) -> None:
        check_options(self)
        check_batch(self.mesh, self.step.batch, self.step.seq, self.step.accumulation)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A case from plain values by their keys in case files: Case.of(model="llama3-8b", mesh="tp=8",
        seq=4096). None stands for a key that isn't given. Raises OptionError for an unknown key."""
        known = {asked.key for asked in SHARED}
        for key in values:
            if key not in known:
                raise OptionError(
                    f'case: unknown key "{key}".{suggest(key, known)} Allowed: {", ".join(sorted(known))}.'
                )
        for key in ("model", "mesh"):
            if values.get(key) is None:
                raise OptionError(f"case: {key} is missing. Give one, such as {_EXAMPLES[key]}.")
        mesh = _fields(cls, values)["mesh"]
        if values.get("accumulation") is None and mesh.stages > 1:
            values = values | {"accumulation": mesh.stages}
        step = StepSettings(**_fields(StepSettings, values))
        return cls(**_fields(cls, values), step=step, text=TextSource(**_fields(TextSource, values)))

    def values(self) -> dict[str, Any]:
        """All that is asked, by its keys in case files; the mesh as a Mesh."""
        found: dict[str, Any] = {}
        for noun in (self, self.step, self.text):
            kind: Any = type(noun)
            found |= {asked.key: getattr(noun, asked.field) for asked in options_of(kind)}
        return found


SHARED: tuple[Asked, ...] = tuple(
    asked for noun in (Case, StepSettings, TextSource) for asked in options_of(noun)
)
"""All that verbs share, flat."""


def words_of(case: Case, keys: Collection[str]) -> Iterator[str]:
    """The words of a command that give these keys as the case has them, plans first."""
    values = case.values()
    for asked in sorted(SHARED, key=lambda asked: not asked.option.is_argument):
        if asked.key not in keys:
            continue
        value = values[asked.key]
        if asked.option.is_argument:
            yield from value
        elif isinstance(value, bool):
            on, _, off = asked.flag.partition("/")
            yield on if value else off
        else:
            for each in value if isinstance(value, tuple) else (value,):
                yield from (asked.flag, str(each))


_EXAMPLES = {"model": 'model="llama3-debug"', "mesh": 'mesh="tp=2"'}


def _fields(noun: type, values: dict[str, Any]) -> dict[str, Any]:
    """A noun's fields among flat values."""
    given = {asked.field: (asked, values.get(asked.key)) for asked in options_of(noun)}
    return {field: _made(asked, value) for field, (asked, value) in given.items() if value is not None}


def _made(asked: Asked, value: Any) -> Any:
    if asked.kind is Mesh:
        return value if isinstance(value, Mesh) else Mesh.parse(value)
    if asked.is_many:
        return (str(value),) if isinstance(value, str | Path) else tuple(str(each) for each in value)
    return str(value) if isinstance(value, Path) else value
