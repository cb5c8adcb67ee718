"""A training step of one long sequence: shared by two ranks of a cp axis, against one rank that has it all.

    python -m benchmarks.context             writes benchmarks/results/DATE-context-cp2.json
    python -m benchmarks.context --dry       prints, writes nothing

Sides, all in the same processes and rounds, a thread for each rank, fp32, the same weights and ids,
AdamW(fused=True): one rank alone (the other waits), attention by a gather of keys and values, and on a ring.
The first step's losses are compared before anything is timed; each side's second step is counted: what its
sockets send beside what its formula says. Memory is that of the steps' Programs, which real steps are held to
(tests/distributed/test_context.py).
"""

from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import Tensor

from benchmarks import results, sides
from benchmarks.results import Bar, BarKind, Result, compare
from benchmarks.rounds import interleave
from shardwise.core.batch_part import BatchPart
from shardwise.core.case import StepSettings
from shardwise.core.measurement import TextSummary
from shardwise.core.mesh import Mesh
from shardwise.core.plan import ContextAttention, Plan
from shardwise.core.program import MemoryKind, memory_peak
from shardwise.launch import RankContext
from shardwise.measure.sockets import sent_bytes, sent_since
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.recorder import CollectiveRecorder
from shardwise.step.build import build_model, device_mesh
from shardwise.step.groups import axis_names
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.trace.trace import trace

WHAT = "context-cp2"
RANKS = 2
ALONE, GATHER, RING = "one rank", "cp 2, gather", "cp 2, ring"
ABOUT = {
    ALONE: "the whole sequence on one rank",
    GATHER: "keys and values gathered in each layer",
    RING: "keys and values go round",
}
WAYS = {GATHER: ContextAttention.GATHER, RING: ContextAttention.RING}
AT_MOST = 0.65


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run; the sequence is the one that the bar is stated for."""

    model: str = "llama3-debug?n_layers=2,vocab_size=4000"
    seq: int = 4096
    rounds: int = 5
    warm_ups: int = 1
    seed: int = 0


class Sent(msgspec.Struct, frozen=True):
    """Of one step and rank: bytes by the formulas, and what its sockets sent, where the system tells."""

    formula: float
    sockets: int | None


class Report(msgspec.Struct, frozen=True):
    """One rank's times by side, losses of all its steps, and what a step sent."""

    times_s: dict[str, list[float]]
    losses: dict[str, list[float]]
    sent: dict[str, Sent]
    variables: tuple[tuple[str, str], ...]


class Step:
    """A side on this rank. step: None where the rank waits."""

    def __init__(self, name: str, step: TrainStep | None, batch: list[tuple[Tensor, Tensor]]) -> None:
        self.name = name
        self.losses: list[float] = []
        self._step, self._batch = step, batch

    def prepare(self, round_: int) -> None:
        """Every round has the same ids."""

    def run(self) -> None:
        if self._step is not None:
            self.losses.append(float(self._step(self._batch).loss))


def plan(name: str) -> Plan:
    return builtin_plan("rowwise", context_attention=WAYS[name])


def ids_of(settings: Settings) -> Tensor:
    vocab = get_spec(settings.model).vocab_size
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(vocab, (1, settings.seq + 1), generator=generator)


def worker(context: RankContext, payload: bytes) -> bytes:
    """One rank: all sides, stepped once and compared, counted, timed."""
    settings, _ = sides.unpacked(payload, Settings)
    mesh = device_mesh(Mesh((("cp", RANKS),)), "cpu")
    ids = ids_of(settings)
    build = partial(
        build_model, get_spec(settings.model), dtype=torch.float32, device=context.device, seed=settings.seed
    )
    steps = []
    for name in ABOUT:
        context.note(f"build: {name}")
        shared = mesh if name in WAYS else None
        portion = Portion.on(mesh) if shared is not None else Portion(part=BatchPart())
        step = None
        if shared is not None or context.rank == 0:
            model = build(plan=plan(name) if shared is not None else None, mesh=shared)
            step = TrainStep(model, mesh=shared)
        steps.append(Step(name, step, portion.cut(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())))
    sent = {}
    for side in steps:
        context.note(f"first steps: {side.name}")
        side.run()
        sent[side.name] = _counted(side, axis_names(mesh))
    times = interleave(steps, settings.rounds, settings.warm_ups, context.note)
    losses = {side.name: side.losses for side in steps}
    return msgspec.json.encode(Report(times, losses, sent, results.rank_variables()))


def _counted(side: Step, axes: dict[str, str]) -> Sent:
    before = sent_bytes()
    with CollectiveRecorder(axes) as recorder:
        side.run()
    return Sent(sum(call.wire_bytes for call in recorder.calls), sent_since(before))


def _activations(settings: Settings, name: str) -> int:
    """Bytes of activations at the peak of a side's Program, rank 0."""
    mesh = Mesh((("cp", RANKS if name in WAYS else 1),))
    step = StepSettings(1, settings.seq)
    made = plan(name) if name in WAYS else builtin_plan("rowwise")
    program = trace(get_spec(settings.model), made, mesh, step, ids=ids_of(settings)[:, :-1])
    return dict(memory_peak(program).by_kind)[MemoryKind.ACTIVATION]


def measure(settings: Settings) -> Result:
    started, load_before = results.now(), results.load_average()
    reports = sides.launch("benchmarks.context:worker", settings, Report, RANKS)
    losses = reports[0].losses
    found = tuple(
        sides.joined(name, about, [each.times_s[name] for each in reports], losses[name], settings.seq)
        for name, about in ABOUT.items()
    )
    return Result(
        what=WHAT,
        settings={
            "model": settings.model,
            "cp": RANKS,
            "batch": 1,
            "seq": settings.seq,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups + 2,
            "seed": settings.seed,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.context"), RANKS, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=TextSummary("uniform random ids", "none", settings.seq + 1, 0, 0, ""),
        checks=(
            sides.agreed({name: each[0] for name, each in losses.items()}),
            *_sent_as_said(reports),
            _halved(settings),
        ),
        sides=found,
        comparisons=(
            compare(found, GATHER, ALONE, Bar(BarKind.COST_AT_MOST, AT_MOST), is_cost=True),
            compare(found, RING, ALONE, Bar(BarKind.COST_AT_MOST, AT_MOST), is_cost=True),
            compare(found, RING, GATHER),
        ),
        notes=(
            "Both ranks hold all parameters: gradients are summed over cp, and the optimizer's work isn't "
            "shared.",
            "gloo between two processes of one machine; a ranking on NCCL need not be the same.",
        ),
    )


def _sent_as_said(reports: list[Report]) -> list[str]:
    found = []
    for name in WAYS:
        sent = reports[0].sent[name]
        said = (
            f"{name}: a step sends {sent.formula / 1e6:.1f} MB by the formulas (gradients of all parameters "
            "included)"
        )
        if sent.sockets is None:
            found.append(f"{said}; this system doesn't tell what sockets send.")
            continue
        over = sent.sockets / sent.formula - 1
        found.append(f"{said}, and rank 0's sockets {sent.sockets / 1e6:.1f} MB: {over:+.1%}.")
    return found


def _halved(settings: Settings) -> str:
    alone, *shared = (_activations(settings, name) for name in ABOUT)
    shares = ", ".join(f"{part / alone:.3f} ({name})" for part, name in zip(shared, WAYS, strict=True))
    return f"Activations at the peak, of one rank's {alone / 2**20:.1f} MiB: {shares}."


if __name__ == "__main__":
    sides.command("context", __doc__, Settings(), ("model", "seq", "rounds"), measure)
