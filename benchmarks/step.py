"""A whole training step of one model at one TP size: the native engine, PyTorch's own styles, and
transformers' tensor parallelism.

Sides, all in the same processes and rounds, fp32, the same initial weights and real-text batches,
AdamW(fused=True):
    rowwise, colwise, routed            the native engine's plans
    rowwise@dtensor, colwise@dtensor    PyTorch's own styles, loss_parallel and clip_grad_norm_, as
                                        torchtitan's 2025 plan has them
    NAME@dtensor, our loss              the same models, with the native engine's vocabulary-parallel loss on
                                        their local logits: both sides run the same loss code
    transformers                        see hugging_face.py; clipped by our clip_gradients (one all-reduce)
    one process, two threads            the same model, unsharded: for scale only, in launches of its own
                                        before and after the others

Before anything is timed the first step's losses of all sides are compared.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

from benchmarks import results, sides
from benchmarks.hugging_face import TransformersStep
from benchmarks.results import Bar, BarKind, Comparison, Result, Side, compare
from benchmarks.rounds import interleave
from shardwise.core.mesh import Mesh
from shardwise.core.rule import RuleRef
from shardwise.launch import RankContext
from shardwise.models.llama import LlamaConfig
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

LEARNING_RATE = 3e-4
MAX_NORM = 1.0

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
    "On a CPU mesh DTensor replaces its all-to-all by an all-gather and a chunk, and gloo's own "
    "reduce-scatter, which the dtensor sides use, sends twice what a ring needs. So a ranking on gloo need "
    "not hold on NCCL.",
    "The dtensor sides clip as torchtitan did, with an all-reduce per parameter; ours and transformers' "
    "with one.",
    "transformers shards without sequence parallelism and gathers the logits.",
    f'"{SINGLE}" is a separate run of one process, half of its rounds before the other sides and half '
    "after: for scale, not a paired ratio.",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run; the defaults are those that the bars are stated for. sides: which run."""

    model: str = "llama3-debug"
    tp: int = 2
    batch: int = 4
    seq: int = 512
    rounds: int = 15
    warm_ups: int = 2
    seed: int = 0
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
    """The native engine's loss for DTensor logits Shard(-1). The view as a local tensor costs no copy, and
    neither does its gradient."""

    inner: VocabParallelLoss

    def __call__(self, logits: Tensor, labels_BS: Tensor, valid: Tensor | int | None = None) -> Tensor:
        assert isinstance(logits, DTensor)
        return self.inner(logits.to_local(grad_placements=[TorchShard(logits.dim() - 1)]), labels_BS, valid)

    def backward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class Step:
    """A side: one training step per round. The first step, on batch 0, isn't a round."""

    def __init__(
        self, name: str, step: Callable[[Sequence[tuple[Tensor, Tensor]]], StepResult], batches: Batches
    ) -> None:
        self.name = name
        self.losses: list[float] = []
        self._step = step
        self._batches = batches
        self._micro_batches: list[tuple[Tensor, Tensor]] = []

    def first_step(self) -> float:
        """Its loss."""
        self.prepare(-1)
        self.run()
        return self.losses[0]

    def prepare(self, round_: int) -> None:
        batch = self._batches.at(round_ + 1)
        self._micro_batches = [(batch.ids_BS, batch.labels_BS)]

    def run(self) -> None:
        self.losses.append(float(self._step(self._micro_batches).loss))


def worker(context: RankContext, payload: bytes) -> bytes:
    """One rank: builds all sides, steps each once and compares the losses, times them."""
    settings, stream = sides.unpacked(payload, Settings)
    batches = Batches(TokenStream.from_bytes(stream), settings.batch, settings.seq)
    steps = []
    for name in settings.sides:
        context.note(f"build: {name}")
        steps.append(Step(name, _step(name, settings), batches))
    first_losses = {}
    for side in steps:
        context.note(f"first step: {side.name}")
        first_losses[side.name] = side.first_step()
    sides.agreed(first_losses)
    times = interleave(steps, settings.rounds, settings.warm_ups, context.note)
    report = RankReport(
        tuple(RankSide(side.name, tuple(times[side.name]), tuple(side.losses)) for side in steps),
        results.rank_variables(),
    )
    return msgspec.json.encode(report)


def _step(name: str, settings: Settings) -> Callable[[Sequence[tuple[Tensor, Tensor]]], StepResult]:
    """What one side does in a step, on this rank."""
    spec = get_spec(settings.model)
    if name == TRANSFORMERS:
        assert isinstance(spec.config, LlamaConfig)
        return TransformersStep(
            spec.config, settings.tp, seed=settings.seed, learning_rate=LEARNING_RATE, max_norm=MAX_NORM
        )
    mesh = None if name == SINGLE else device_mesh(Mesh((("tp", settings.tp),)), "cpu")
    plan = None if name == SINGLE else builtin_plan(name.removesuffix(OUR_LOSS), family=spec.family)
    model = build_model(spec, plan, mesh, dtype=torch.float32, device=torch.device("cpu"), seed=settings.seed)
    if mesh is not None and name.endswith(OUR_LOSS):
        site = Site("output", RuleRef("output", "colwise"), Axis.of(mesh, "tp"))
        loss: Loss = OurLoss(VocabParallelLoss(site, RowOwnership(spec.vocab_size, settings.tp)))
        # the one way to give a sharded model another loss: TrainStep asks the model for it
        model._shardwise = replace(applied_to(model), loss=loss)  # type: ignore[assignment]
    return TrainStep(model, mesh=mesh, learning_rate=LEARNING_RATE, max_norm=MAX_NORM)


def _comparisons(found: tuple[Side, ...]) -> tuple[Comparison, ...]:
    """Speedups in tokens per second. Bars are stated for rowwise against the same plan on DTensor, and
    against transformers."""
    names = {side.name for side in found}
    stated = [
        ("rowwise", "rowwise@dtensor", Bar(BarKind.SPEEDUP_AT_LEAST, 1.25)),
        ("rowwise", f"rowwise@dtensor{OUR_LOSS}", None),
        ("colwise", "colwise@dtensor", None),
        ("colwise", f"colwise@dtensor{OUR_LOSS}", None),
        ("routed", "rowwise@dtensor", None),
        ("routed", "colwise@dtensor", None),
        ("rowwise", TRANSFORMERS, Bar(BarKind.SPEEDUP_AT_LEAST, 1.3)),
        ("colwise", TRANSFORMERS, None),
        ("routed", TRANSFORMERS, None),
        ("routed", "rowwise", None),
        ("routed", "colwise", None),
    ]
    return tuple(compare(found, ours, other, bar) for ours, other, bar in stated if {ours, other} <= names)


def measure(settings: Settings) -> Result:
    """Half of the single process's rounds, all rounds of the ranks, the other half."""
    started, load_before = results.now(), results.load_average()
    spec = get_spec(settings.model)
    stream = load_tokens(vocab_size=spec.vocab_size, progress=print)
    single = replace(settings, tp=1, sides=(SINGLE,), rounds=-(-settings.rounds // 2))
    worker = "benchmarks.step:worker"
    before = sides.launch(worker, single, RankReport, 1, stream=stream, threads=2)
    reports = sides.launch(worker, settings, RankReport, settings.tp, stream=stream)
    after = sides.launch(worker, single, RankReport, 1, stream=stream, threads=2)
    found = [
        _join([report.sides[index] for report in reports], settings) for index in range(len(settings.sides))
    ]
    halves = [_join([half.sides[0]], settings) for half in (*before, *after)]
    found.append(replace(halves[0], rank_times_s=(halves[0].rank_times_s[0] + halves[1].rank_times_s[0],)))
    return Result(
        what=f"step-tp{settings.tp}",
        settings={
            "model": settings.model,
            "parameters": spec.config.n_parameters,
            "tp": settings.tp,
            "batch": settings.batch,
            "seq": settings.seq,
            "tokens": settings.batch * settings.seq,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups + 1,
            "seed": settings.seed,
            "learning_rate": LEARNING_RATE,
            "max_norm": MAX_NORM,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.step"), settings.tp, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=stream.summary,
        checks=(sides.agreed({side.name: side.losses[0] for side in found}),),
        sides=tuple(found),
        comparisons=_comparisons(tuple(found)),
        notes=NOTES,
    )


def _join(ranks: list[RankSide], settings: Settings) -> Side:
    """All ranks' views of one side."""
    name, tokens = ranks[0].name, settings.batch * settings.seq
    return sides.joined(name, ABOUT[name], [rank.times_s for rank in ranks], ranks[0].losses, tokens)


if __name__ == "__main__":
    sides.command("step", __doc__, Settings(), ("model", "tp", "batch", "seq", "rounds"), measure)
