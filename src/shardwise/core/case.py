"""What is asked of a verb: the model, the mesh, the plans, the training step, the text, the machine. One noun for all verbs.

Only what one verb knows (rounds, against, stages, ...) is that verb's own. What needs the model (positions, divisibility) the verb checks.
"""

from dataclasses import dataclass, field

from shardwise.core.errors import OptionError
from shardwise.core.mesh import Mesh, Role


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The training step that every plan runs: the same data, loss, clipping and optimizer (AdamW).

    batch: sequences per optimizer step over all ranks; accumulation: micro-batches that it is cut into.
    param_dtype, reduce_dtype: FSDP's mixed precision, as PyTorch's MixedPrecisionPolicy has it: what parameters are
    gathered and layers computed in (None: dtype), and what gradients are reduced in (None: as computed); shards,
    their gradients and the optimizer's state stay in dtype.
    """

    batch: int
    seq: int
    dtype: str = "float32"
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    accumulation: int = 1
    recompute: str = "none"
    compiled: bool = False
    learning_rate: float = 3e-4
    max_norm: float = 1.0
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def computed_dtype(self) -> str:
        """What layers compute in."""
        return self.param_dtype or self.dtype

    @property
    def precision(self) -> str:
        """The dtypes in words: "float32", or "float32, computed in bfloat16, reduced in float32"."""
        if self.param_dtype is None and self.reduce_dtype is None:
            return self.dtype
        reduced = self.reduce_dtype or self.computed_dtype
        return f"{self.dtype}, computed in {self.computed_dtype}, reduced in {reduced}"


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where token ids come from: text files or folders (none: Python's own documentation), cut by a tokenizer.json (None: one is trained
    on the text); or, with random_ids, nowhere: uniform random ids."""

    files: tuple[str, ...] = ()
    tokenizer: str | None = None
    random_ids: bool = False

    def __post_init__(self) -> None:
        if self.random_ids and (self.files or self.tokenizer is not None):
            raise OptionError(
                "random ids come without text. Leave out the text files and the tokenizer, or the random ids."
            )


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked. plans: as a user names them, the first being what others are held against; none: what suits the model.

    machine: of `shardwise machines`, or a file; None: the verb's own choice. device: auto, cpu or cuda. sequence_parallel: of built-in plans.
    """

    model: str = "llama3-debug"
    mesh: Mesh = field(default_factory=lambda: Mesh.of({Role.CUTS_TENSORS: 2}))
    plans: tuple[str, ...] = ()
    step: StepSettings = field(default_factory=lambda: StepSettings(batch=4, seq=256))
    text: TextSource = TextSource()
    machine: str | None = None
    device: str = "auto"
    sequence_parallel: bool = True
