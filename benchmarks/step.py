"""A whole training step of one model at one TP size: the native engine, PyTorch's own styles, and transformers' tensor parallelism.

Sides, all in the same processes and rounds, fp32, the same initial weights and real-text batches, AdamW(fused=True):
    rowwise, colwise, routed            the native engine's plans
    rowwise@dtensor, colwise@dtensor    PyTorch's own styles, loss_parallel and clip_grad_norm_, as torchtitan's 2025 plan has them
    NAME@dtensor, our loss              the same models, with the native engine's vocabulary-parallel loss on their local logits, so that
                                        both sides of the comparison run the same loss code
    transformers                        see hugging_face.py; clipped by our clip_gradients (one all-reduce of one number)
    one process, two threads            the same model, unsharded: for scale only, in launches of its own before and after the others

Before anything is timed the first step's losses of all sides are compared.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

from benchmarks import results
from benchmarks.hugging_face import TransformersStep, save_checkpoint
from benchmarks.results import Bar, BarKind, Comparison, Result, Side, compare
from benchmarks.rounds import interleave
from shardwise.core.errors import RunError
from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext, run_ranks
from shardwise.models.specs import get_spec
from shardwise.parallel.apply import applied_to
from shardwise.parallel.axis import Axis, Site
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.loss import Loss, VocabParallelLoss
from shardwise.parallel.ownership import RowOwnership
from shardwise.step.build import build_model, device_mesh
from shardwise.step.train import StepResult, TrainStep
from shardwise.text.batches import Batches
from shardwise.text.stream import TokenStream, load_tokens

TIMEOUT_S = 300.0
LEARNING_RATE = 3e-4
MAX_NORM = 1.0
LOSS_TOLERANCE = 1e-4

SINGLE = "one process, two threads"
TRANSFORMERS = "transformers"
OUR_LOSS = ", our loss"
ABOUT = {
    "rowwise": "native engine",
    "colwise": "native engine",
    "routed": "native engine",
    "rowwise@dtensor": "PyTorch's styles, loss_parallel, clip_grad_norm_",
    "colwise@dtensor": "PyTorch's styles, loss_parallel, clip_grad_norm_",
    f"rowwise@dtensor{OUR_LOSS}": "the same with the native engine's loss",
    f"colwise@dtensor{OUR_LOSS}": "the same with the native engine's loss",
    TRANSFORMERS: 'tp_plan="auto", its own loss on gathered logits',
    SINGLE: "unsharded, launches of its own",
}
NOTES = (
    "On a CPU mesh DTensor replaces its all-to-all by an all-gather and a chunk, and gloo's own reduce-scatter, which the dtensor sides "
    "use, sends twice what a ring needs. So a ranking on gloo need not hold on NCCL.",
    "The dtensor sides clip as torchtitan did, with an all-reduce per parameter; ours and transformers' with one.",
    "transformers shards without sequence parallelism and gathers the logits.",
    f'"{SINGLE}" is a separate run of one process, half of its rounds before the other sides and half after: for scale, not a paired ratio.',
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run; the defaults are those that the bars are stated for. checkpoint: transformers' folder; sides: which run."""

    model: str = "llama3-debug"
    tp: int = 2
    batch: int = 4
    seq: int = 512
    rounds: int = 15
    warm_ups: int = 2
    seed: int = 0
    checkpoint: str = ""
    sides: tuple[str, ...] = tuple(name for name in ABOUT if name != SINGLE)


@dataclass(frozen=True, slots=True)
class RankSide:
    """One rank's view of one side; losses of all steps, the check's and the warm-ups' included."""

    name: str
    times_s: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RankReport:
    sides: tuple[RankSide, ...]
    variables: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class OurLoss:
    """The native engine's loss for DTensor logits Shard(-1). The view as a local tensor costs no copy, and neither does its gradient."""

    inner: VocabParallelLoss

    def __call__(self, logits: Tensor, labels_BS: Tensor, valid: Tensor | int | None = None) -> Tensor:
        assert isinstance(logits, DTensor)
        return self.inner(logits.to_local(grad_placements=[TorchShard(logits.dim() - 1)]), labels_BS, valid)

    def backward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class Step:
    """A side: one training step per round."""

    def __init__(self, name: str, step: Callable[[Sequence[tuple[Tensor, Tensor]]], StepResult], batches: Batches) -> None:
        self.name = name
        self.losses: list[float] = []
        self._step = step
        self._batches = batches
        self._micro_batches: list[tuple[Tensor, Tensor]] = []

    def prepare(self, round_: int) -> None:
        batch = self._batches.at(round_)
        self._micro_batches = [(batch.ids_BS, batch.labels_BS)]

    def run(self) -> None:
        self.losses.append(float(self._step(self._micro_batches).loss))


def worker(context: RankContext, payload: bytes) -> bytes:
    """One rank: builds all sides, steps each once and compares the losses, times them."""
    settings, stream = _unpack(payload)
    batches = Batches(stream, settings.batch, settings.seq)
    sides = []
    for name in settings.sides:
        context.note(f"build: {name}")
        sides.append(Step(name, _step(name, settings), batches))
    for side in sides:
        context.note(f"first step: {side.name}")
        side.prepare(0)
        side.run()
    _check_losses([(side.name, side.losses[0]) for side in sides])
    # rounds begin with the batch after the first
    for side in sides:
        side.prepare = _shifted(side.prepare)  # type: ignore[method-assign]
    times = interleave(sides, settings.rounds, settings.warm_ups, context.note)
    report = RankReport(
        tuple(RankSide(side.name, tuple(times[side.name]), tuple(side.losses)) for side in sides), results.rank_variables()
    )
    return msgspec.json.encode(report)
