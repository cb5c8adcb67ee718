"""What the ranks of test_pipeline.py run: the training step over stages, held against the whole model on one
process; with faults planted in it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Phase
from shardwise.launch import RankContext
from shardwise.models.source import find_model, vocab_size_of
from shardwise.parallel.plans import load_any_plan
from shardwise.parallel.stages import Stage
from shardwise.step import pipeline
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep, mixed_precision
from shardwise.verify.expected import shake
from shardwise.verify.noise import NoDropout

SEQ = 16


class Trial(msgspec.Struct, frozen=True):
    """One model on one mesh. fault: of FAULTS, planted while it runs."""

    model: str
    mesh: str
    plan: str = "unsharded"
    schedule: str = "1f1b"
    chunks: int = 1
    stages: str = "even"
    micro_batches: int = 4
    recompute: str = "none"
    recompute_layers: int | None = None
    reduce_once: bool = False
    fault: str = ""

    @property
    def settings(self) -> StepSettings:
        mesh = Mesh.parse(self.mesh)
        return StepSettings(
            batch=mesh.data_parallel * self.micro_batches,
            seq=SEQ,
            dtype="float64",
            accumulation=self.micro_batches,
            recompute=self.recompute,
            recompute_layers=self.recompute_layers,
            schedule="interleaved" if self.chunks > 1 else self.schedule,
            chunks=self.chunks,
            stages=self.stages,
        )


class Found(msgspec.Struct):
    """How far a rank is off the whole model, relative and the largest of all parameters: the loss, gradients,
    gradient norms, parameters after two steps. held: parameters that it has."""

    loss: float
    gradients: float
    norms: float
    after: float
    held: list[str]
    error: str = ""


def trials(context: RankContext, payload: bytes) -> bytes:
    """A Found for each Trial."""
    found = []
    for trial in msgspec.msgpack.decode(payload, type=tuple[Trial, ...]):
        try:
            with FAULTS[trial.fault]():
                found.append(_run(context, trial))
        except Exception as error:
            if not trial.fault:
                raise
            found.append(Found(0, 0, 0, 0, [], str(error)))
    return msgspec.msgpack.encode(found)


def _run(context: RankContext, trial: Trial) -> Found:
    mesh, settings, source = Mesh.parse(trial.mesh), trial.settings, find_model(trial.model)
    on = device_mesh(mesh, "cpu")
    given: Any = {"dtype": torch.float64, "device": context.device, "seed": 0}
    plan = load_any_plan(trial.plan, sequence_parallel=True, family=source.family)
    whole = build_model(source, None, None, on_parameter=shake, **given)
    ours = build_model(
        source, plan, on, on_parameter=shake, pipeline=settings.pipeline(mesh), recompute=trial.recompute,
        recompute_layers=trial.recompute_layers, policy=mixed_precision(settings), **given,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size_of(whole), (settings.batch, SEQ), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, :5] = -100  # uneven over ranks and micro-batches
    portion = Portion.on(on, settings.accumulation)
    steps = [(TrainStep(whole, mesh=None, learning_rate=1e-3), [(ids, labels)])]
    sharded = TrainStep(ours, mesh=on, learning_rate=1e-3, reduce_once=trial.reduce_once)
    steps.append((sharded, portion.cut(ids, labels)))
    with NoDropout():
        (expected, norms), (mine, my_norms) = (_two_steps(*each) for each in steps)
    names = [name for name, _ in ours.named_parameters()]
    return Found(
        abs(mine[0] / expected[0] - 1),
        max(_off(mine[1][name], expected[1][name]) for name in names),
        max(abs(a / b - 1) for a, b in zip(my_norms, norms, strict=True)),
        max(_off(mine[2][name], expected[2][name]) for name in names),
        names,
    )


def dying(context: RankContext, payload: bytes) -> bytes:
    """Trains a pipeline; a rank kills itself in a phase of its second step. Each reports its process id."""
    context.report(str(os.getpid()).encode())
    rank, phase = msgspec.msgpack.decode(payload, type=tuple[int, str])
    model_name = "llama3-debug?vocab_size=96,hidden=32,n_layers=6,n_heads=4,n_kv_heads=4,ffn_hidden=48"
    trial = Trial(model_name, "pp=3")
    mesh, settings, source = Mesh.parse(trial.mesh), trial.settings, find_model(trial.model)
    on = device_mesh(mesh, "cpu")
    steps: list[int] = []

    def entered(now: Phase) -> None:
        if context.rank == rank and steps and now == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    model = build_model(
        source, TheirPlan.UNSHARDED, on, pipeline=settings.pipeline(mesh), dtype=torch.float64,
        device=context.device, seed=0,
    )  # fmt: skip
    step = TrainStep(model, mesh=on, on_phase=entered)
    ids = torch.zeros(settings.batch, SEQ, dtype=torch.int64)
    for number in range(3):
        context.note(f"step {number}")
        step(Portion.on(on, settings.accumulation).cut(ids, ids))
        steps.append(number)
    return b""


Result = tuple[float, dict[str, Tensor], dict[str, Tensor]]


def _two_steps(step: TrainStep, batch: list[tuple[Tensor, Tensor]]) -> tuple[Result, list[float]]:
    loss = float(step.gradients(batch))
    gradients = {name: _whole(p.grad) for name, p in step.model.named_parameters() if p.grad is not None}
    norms = [float(step(batch).gradient_norm) for _ in range(2)]
    after = {name: _whole(p) for name, p in step.model.named_parameters()}
    return (loss, gradients, after), norms


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _off(ours: Tensor, whole: Tensor) -> float:
    return float((ours - whole).norm() / whole.norm())


@contextmanager
def _tied_not_summed() -> Iterator[None]:
    with patch.object(pipeline.Passes, "sum_tied", lambda self: None):
        yield


@contextmanager
def _tied_counted_twice() -> Iterator[None]:
    with patch.object(pipeline.Passes, "counted_elsewhere", frozenset()):
        yield


@contextmanager
def _loss_of_each_micro_batch() -> Iterator[None]:
    """The loss isn't divided by what counts in the global batch, but by what counts in its micro-batch."""
    run = pipeline.Passes.run

    def alone(self: pipeline.Passes, ids: list[Tensor], labels: list[Tensor], valid: Tensor) -> Tensor:
        return run(self, ids, labels, valid / len(ids))

    with patch.object(pipeline.Passes, "run", alone):
        yield


@contextmanager
def _layer_twice() -> Iterator[None]:
    """Every part runs its last layer once more."""
    run = Stage.run

    def again(self: Stage, model: nn.Module, part: int, ids: Tensor, received: Tensor | None) -> Tensor:
        layer = model.get_submodule(self.last_layer(part))
        once = layer.forward

        def twice(hidden: Tensor, *rest: object) -> Tensor:
            out: Tensor = once(once(hidden, *rest), *rest)
            return out

        with patch.object(layer, "forward", twice):
            return run(self, model, part, ids, received)

    with patch.object(Stage, "run", again):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "tied not summed": _tied_not_summed,
    "tied counted twice": _tied_counted_twice,
    "loss of each micro-batch": _loss_of_each_micro_batch,
    "layer twice": _layer_twice,
}
