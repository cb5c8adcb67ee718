"""Prediction: what a plan's step would take on a machine, term by term. Standard library only.

The terms add up to the step. What isn't modelled is named, and never 0.
"""

from dataclasses import dataclass
from enum import StrEnum

from shardwise.core.allocator import PYTORCHS, AllocatorSettings
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Schedule
from shardwise.core.program import MemoryKind


class Term(StrEnum):
    """A summand of the step. The first five are work of the device, the next four communication that no work
    hides."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    KERNELS = "memory-bound kernels"
    EMBEDDING = "embedding"
    OPTIMIZER = "clipping and optimizer"
    TENSOR = "tensor-parallel communication"
    EXPERTS = "expert-parallel communication"
    CONTEXT = "context-parallel communication"
    DATA = "data-parallel communication"
    SLOWED = "compute slowed by communication beside it"
    LAUNCH = "waiting for launches"
    WAITING = "waiting for late ranks"
    BUBBLE = "pipeline bubble"


EXCHANGE_TERMS = (Term.TENSOR, Term.EXPERTS, Term.CONTEXT)
"""Collectives between a layer's ops, which what follows waits for."""
COMPUTE_TERMS = (Term.MATMUL, Term.ATTENTION, Term.KERNELS, Term.EMBEDDING, Term.OPTIMIZER)


class AttentionKernel(StrEnum):
    """fused: flash, memory-efficient or cuDNN attention, as PyTorch chooses. unfused: matmuls and softmax
    over whole score matrices, as trainers ran it before 2022 (and PyTorch does where no fused kernel takes
    the shapes). flash-1, flash-2: that generation of FlashAttention, where the machine has a rate of it (else
    as fused)."""

    FUSED = "fused"
    UNFUSED = "unfused"
    FLASH_1 = "flash-1"
    FLASH_2 = "flash-2"


class Scaling(StrEnum):
    """By what float8 numbers are scaled. delayed: a tensor's largest of steps before (Transformer Engine);
    tensorwise: its largest of now; rowwise: that of each row (torchao)."""

    DELAYED = "delayed"
    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"


class Precision(StrEnum):
    """What states are kept in. traced: as the Program keeps them (FSDP's mixed precision is in it). master:
    parameters in its dtype; gradients, master weights and AdamW's state in float32 (Megatron's mixed
    precision)."""

    TRACED = "traced"
    MASTER = "master"


class Filling(StrEnum):
    """How parameters get their first values, which leaves an allocator with memory to reuse. shards: each
    rank's own shards, in place (torchtitan; FSDP2 from the meta device). whole: one whole parameter after the
    other on the device, and with FSDP then the model's shards (Shardwise's own ranks)."""

    SHARDS = "shards"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Setup:
    """How a traced micro-batch's Program becomes a whole step, and what is assumed of the run. A choice per
    field, each stated in the result.

    mesh: None for the Program's own. Where the Program was traced without its context ranks, its sequence is
    one rank's part, and they join the reduction of gradients and FSDP's shards. micro_batches: per step.
    chunks: of layers that a stage holds (interleaved). schedule: None for 1F1B, or interleaved with several
    chunks. layers: of each chunk, in the model's order; none: dealt evenly. attention: None where the
    Program's own op says. recompute_attention: the unfused attention between its projections runs again in
    the backward (Korthikanti et al. 2022); a layer's recompute is the Program's. compiled: kernels bound by
    memory fused between matmuls. compiled_loss: the loss is one such kernel each way, and keeps the logits
    alone. matmul_dtype: "float8" where the layers' linears multiply in it, scaled as `scaling` says.
    overlap_data: whether gradients of whole replicas are reduced beside the backward, in buckets of
    bucket_mib (None: as DDP's, or Megatron's: see predict/buckets.py). overlap_tensor: whether
    tensor-parallel collectives run beside the matmul that makes or takes them. sums_float32: gradients of
    half precision are summed over replicas in float32; shards of an optimizer's then send parameters back in
    half. optimizer_shards: ranks that share the optimizer's state and work (ZeRO-1); of experts that each
    rank along ep holds for itself, so many times fewer. waits_for_device: whether the host waits at the end
    of each forward and backward until the device is done, as Megatron's timers made it
    (torch.cuda.synchronize) until 2022. spread_s: the standard deviation over ranks of one second's work,
    whatever the machine says; None: as it says. allocator: how the run's is set up. filled: how parameters
    got their first values. without: terms that are switched off.
    """

    mesh: Mesh | None = None
    micro_batches: int = 1
    chunks: int = 1
    schedule: Schedule | None = None
    layers: tuple[int, ...] = ()
    attention: AttentionKernel | None = None
    recompute_attention: bool = False
    compiled: bool = False
    compiled_loss: bool = False
    matmul_dtype: str | None = None
    scaling: Scaling = Scaling.TENSORWISE
    overlap_data: bool = False
    bucket_mib: float | None = None
    overlap_tensor: bool = False
    optimizer_shards: int = 1
    precision: Precision = Precision.TRACED
    sums_float32: bool = False
    waits_for_device: bool = False
    spread_s: float | None = None
    allocator: AllocatorSettings = PYTORCHS
    filled: Filling = Filling.SHARDS
    without: tuple[Term, ...] = ()

    def pipeline(self) -> Pipeline:
        """Of its stages."""
        chosen = Schedule.INTERLEAVED if self.chunks > 1 else Schedule.ONE_F_ONE_B
        return Pipeline(self.stages, self.chunks, self.schedule or chosen, self.layers)

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.mesh.stages if self.mesh is not None else 1

    @property
    def context(self) -> int:
        """Ranks that share each sequence."""
        return self.mesh.context if self.mesh is not None else 1


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """One rank's memory, of the fullest stage of a pipeline: `stage`. by_kind: at the peak, adding up to
    active_bytes.
    reserved_bytes: what the allocator holds where the device is never full; device_bytes: with what the
    process holds beside. fits: in the machine's memory. given_back: where that doesn't fit, but runs all the
    same, how often a step finds the device full and gives back what is free; None where it fits, and where it
    doesn't run."""

    active_bytes: float
    by_kind: tuple[tuple[MemoryKind, float], ...]
    reserved_bytes: float
    device_bytes: float
    capacity_bytes: float
    stage: int = 0
    given_back: int | None = None

    @property
    def slack_bytes(self) -> float:
        """What the allocator rounds and can't reuse."""
        return self.reserved_bytes - self.active_bytes

    @property
    def fits(self) -> bool:
        return self.device_bytes <= self.capacity_bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """terms: in Term's order, adding up to step_s. tokens: per step over all ranks. When what runs is
    predict/timeline.py's to say."""

    model: str
    plan: str
    machine: str
    axes: tuple[tuple[str, int], ...]
    setup: Setup
    tokens: int
    step_s: float
    terms: tuple[tuple[Term, float], ...]
    memory: MemoryForecast
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        return Mesh(self.axes).world_size

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.step_s / self.devices
