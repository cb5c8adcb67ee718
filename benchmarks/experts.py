"""A training step of a mixture of experts on two ranks: experts by expert, cut inside, and every rank
computing all tokens.

    python -m benchmarks.experts          writes benchmarks/results/DATE-experts-ep2.json
    python -m benchmarks.experts --dry    prints, writes nothing

Sides, all in the same processes and rounds, fp32, the same initial weights and real-text batches,
AdamW(fused=True), each of the same global batch:
    by expert     mesh ep=2, the built-in plan rowwise: a rank has half the experts and half the sequences
    cut inside    mesh tp=2, the same plan: a rank has half of each expert, and all tokens
    all tokens    each rank has the whole model and trains it on the whole batch: for scale
Loads: what share of all choices goes to the experts of rank 0: as the router chooses, or drawn with that
share, in place of the router's choice. Cut inside takes no notice of the load.

Before anything is timed the first losses are compared, and the bytes that one layer's exchange leaves on the
sockets with the formula's (parallel/experts.py) by the choices that were made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import results, sides
from benchmarks.results import Bar, BarKind, Result, Side, compare
from benchmarks.rounds import interleave
from benchmarks.step import LEARNING_RATE, MAX_NORM, RankReport, RankSide
from shardwise.core.errors import RunError
from shardwise.core.mesh import Mesh
from shardwise.launch import RankContext
from shardwise.measure.sockets import sent_bytes, sent_since
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.text.batches import Batches
from shardwise.text.stream import TokenStream, load_tokens

RANKS = 2
BY_EXPERT, INSIDE, ALL = "by expert", "cut inside", "all tokens"
MESHES = {BY_EXPERT: "ep=2", INSIDE: "tp=2", ALL: None}
LOADS = (0.75, 1.0)
ABOUT = {
    BY_EXPERT: "half the experts and half the sequences on a rank",
    INSIDE: "half of each expert on a rank, and all tokens",
    ALL: "the whole model and the whole batch on every rank",
}
# gloo's own headers and the rendezvous store's words, beside the rows
MOST_BYTES_OFF = 0.02


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run; the defaults are those that the bar is stated for."""

    model: str = "moe-debug"
    batch: int = 8
    seq: int = 256
    rounds: int = 15
    warm_ups: int = 2
    seed: int = 0


class Load:
    """Puts drawn choices in the place of the router's, in all layers: of each token all choices are experts
    of rank 0, with probability `share`, or all of others. None: the router's own."""

    def __init__(self, model: nn.Module, experts: int, seed: int) -> None:
        self.share: float | None = None
        self._experts = experts
        self._generator = torch.Generator().manual_seed(seed)
        for name, module in model.named_modules():
            if name.endswith(".router"):
                module.register_forward_hook(self._chosen)

    def _chosen(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        index_NK, weights_NK = output
        if self.share is None:
            return output
        tokens, choices = index_NK.shape
        half = self._experts // RANKS
        within = torch.rand(tokens, half, generator=self._generator).topk(choices).indices
        is_first = torch.rand(tokens, 1, generator=self._generator) < self.share
        return within.where(is_first, within + half), weights_NK


class Step:
    """One training step per round, at one load."""

    def __init__(
        self, name: str, step: TrainStep, load: Load, share: float | None, portion: Portion, batches: Batches
    ) -> None:
        self.name = name
        self.losses: list[float] = []
        self._step, self._load, self._share = step, load, share
        self._portion, self._batches = portion, batches
        self._own: list[tuple[Tensor, Tensor]] = []

    def prepare(self, round_: int) -> None:
        batch = self._batches.at(round_ + 1)
        self._own = self._portion.cut(batch.ids_BS, batch.labels_BS)
        self._load.share = self._share

    def run(self) -> None:
        self.losses.append(float(self._step(self._own).loss))


def worker(context: RankContext, payload: bytes) -> bytes:
    """One rank: builds all sides, compares losses and bytes, times them."""
    settings, stream = sides.unpacked(payload, Settings)
    batches = Batches(TokenStream.from_bytes(stream), settings.batch, settings.seq)
    steps: list[Step] = []
    for name in MESHES:
        context.note(f"build: {name}")
        steps += _sides(name, settings, batches)
    first = {}
    for side in steps:
        context.note(f"first step: {side.name}")
        side.prepare(-1)
        side.run()
        if side.name in MESHES:
            first[side.name] = side.losses[0]
    sides.agreed(first)
    context.note("bytes of one layer")
    bytes_seen = _bytes_of_a_layer(settings)
    times = interleave(steps, settings.rounds, settings.warm_ups, context.note)
    found = tuple(RankSide(side.name, tuple(times[side.name]), tuple(side.losses)) for side in steps)
    report = RankReport(found, results.rank_variables())
    return msgspec.json.encode((report, bytes_seen))


def _sides(name: str, settings: Settings, batches: Batches) -> list[Step]:
    """A side at each load; its steps share one model, for the load changes no shape that is kept."""
    spec = get_spec(settings.model)
    axes = MESHES[name]
    mesh = device_mesh(Mesh.parse(axes), "cpu") if axes is not None else None
    plan = builtin_plan("rowwise", family=spec.family) if mesh is not None else None
    model = build_model(spec, plan, mesh, dtype=torch.float32, device=torch.device("cpu"), seed=settings.seed)
    step = TrainStep(model, mesh=mesh, learning_rate=LEARNING_RATE, max_norm=MAX_NORM)
    portion = Portion.on(mesh) if mesh is not None else Portion()
    load = Load(model, int(spec.numbers["n_experts"]), settings.seed)
    shares: Sequence[float | None] = (None,) if name == ALL else (None, *LOADS)
    return [Step(_named(name, share), step, load, share, portion, batches) for share in shares]


def _named(name: str, share: float | None) -> str:
    return name if share is None else f"{name}, {share:.0%} to rank 0"


def _bytes_of_a_layer(settings: Settings) -> tuple[float, float]:
    """(sent on this rank's sockets, by the formula) in the forward and backward of one mixture by expert."""
    spec = get_spec(settings.model).with_layers(1)
    mesh = device_mesh(Mesh.parse("ep=2"), "cpu")
    plan = builtin_plan("rowwise", family=spec.family)
    model = build_model(spec, plan, mesh, dtype=torch.float32, device=torch.device("cpu"), seed=settings.seed)
    layer = model.get_submodule("layers.0.feed_forward")
    rank, hidden = dist.get_rank(), spec.config.hidden
    own = torch.randn(
        settings.batch // RANKS, settings.seq, hidden, generator=torch.Generator().manual_seed(rank)
    )
    own.requires_grad_()
    with torch.no_grad():
        index_NK = layer.get_submodule("router")(own)[0]
    half = int(spec.numbers["n_experts"]) // RANKS
    sent = [int((index_NK // half == other).sum()) for other in range(RANKS)]
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, sent)
    there = sum(sent) - sent[rank]
    back = sum(counts[rank] for other, counts in enumerate(everyone) if other != rank)
    dist.barrier()
    before = sent_bytes()
    layer(own).sum().backward()
    on_sockets = sent_since(before)
    if on_sockets is None:
        raise RunError("this system doesn't tell what a socket sent. Run it on Linux.")
    counts_bytes = half * (RANKS - 1) * 4
    return float(on_sockets), float(2 * (there + back) * hidden * own.element_size() + counts_bytes)


def measure(settings: Settings) -> Result:
    """All sides on two ranks."""
    started, load_before = results.now(), results.load_average()
    spec = get_spec(settings.model)
    stream = load_tokens(vocab_size=spec.vocab_size, progress=print)
    found = sides.launch(
        "benchmarks.experts:worker", settings, tuple[RankReport, tuple[float, float]], RANKS, stream=stream
    )
    reports, seen = [report for report, _ in found], [pair for _, pair in found]
    joined = tuple(
        _side([report.sides[index] for report in reports], settings) for index in range(len(reports[0].sides))
    )
    return Result(
        what="experts-ep2",
        settings={
            "model": settings.model,
            "parameters": spec.config.n_parameters,
            "ranks": RANKS,
            "batch": settings.batch,
            "seq": settings.seq,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups + 1,
            "seed": settings.seed,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.experts"), RANKS, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=stream.summary,
        checks=(
            sides.agreed({side.name: side.losses[0] for side in joined if side.name in MESHES}),
            _bytes_check(seen),
        ),
        sides=joined,
        comparisons=(
            compare(joined, BY_EXPERT, ALL, Bar(BarKind.SPEEDUP_AT_LEAST, 1.3)),
            compare(joined, BY_EXPERT, INSIDE),
            *(compare(joined, _named(BY_EXPERT, share), _named(INSIDE, share)) for share in LOADS),
        ),
        notes=("Ranks share a machine's memory: what travels costs little here, and more between machines.",),
    )


def _bytes_check(seen: Sequence[tuple[float, float]]) -> str:
    off = max(abs(measured / formula - 1) for measured, formula in seen)
    if off > MOST_BYTES_OFF:
        raise RunError(f"the sockets sent other than the formula has it: {seen}.")
    shown = ", ".join(f"rank {rank} {one / 1e6:.3f} MB by the sockets, {other / 1e6:.3f} MB by the formula"
                      for rank, (one, other) in enumerate(seen))  # fmt: skip
    return f"One layer's exchange, forward and backward: {shown}."


def _side(ranks: Sequence[RankSide], settings: Settings) -> Side:
    name, tokens = ranks[0].name, settings.batch * settings.seq
    about = ABOUT[name.partition(",")[0]]
    return sides.joined(name, about, [each.times_s for each in ranks], ranks[0].losses, tokens)


if __name__ == "__main__":
    sides.command("experts", __doc__, Settings(), ("model", "batch", "seq", "rounds"), measure)
