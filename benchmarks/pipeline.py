"""The bubble of a pipeline on real ranks, against what its schedule says.

    python -m benchmarks.pipeline             writes benchmarks/results/DATE-pipeline-pp2.json
    python -m benchmarks.pipeline --dry       prints, writes nothing

Sides, all in the same processes and rounds, a stage on each rank with a thread of its own, fp32, the same
weights and ids, AdamW(fused=True): 1F1B, interleaved with two chunks a stage, and GPipe. A rank's bubble is
what the step's passes last, on the clock that all processes share, less the rank's own work: the time outside
of waits for other ranks. What the schedule says is played through (predict/pipeline.py) from what that
round's passes took.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any
from unittest.mock import patch

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import results, sides
from benchmarks.results import Bar, BarKind, Result, Side, compare
from benchmarks.rounds import interleave
from shardwise.core.measurement import TextSummary
from shardwise.core.mesh import Mesh
from shardwise.core.pipeline import Pipeline, Schedule
from shardwise.core.plan import TheirPlan
from shardwise.core.program import Phase
from shardwise.launch import RankContext
from shardwise.models.specs import get_spec
from shardwise.predict.pipeline import gaps, replay
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep

WHAT = "pipeline-pp2"
STAGES = 2
PIPELINES = {
    "1F1B": Pipeline(STAGES),
    "interleaved": Pipeline(STAGES, 2, Schedule.INTERLEAVED),
    "GPipe": Pipeline(STAGES, 1, Schedule.GPIPE),
}
ABOUT = {
    "1F1B": "one chunk of layers a stage",
    "interleaved": "two chunks of layers a stage",
    "GPipe": "all forwards, then all backwards",
}
WAITED, SAID = "{}: the bubble", "{}: the bubble as its schedule has it"
WITHIN = 1.15


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run."""

    model: str = "llama3-debug?n_layers=8,vocab_size=1000"
    seq: int = 256
    micro_batches: int = 4
    rounds: int = 9
    warm_ups: int = 2
    seed: int = 0


class Turned(msgspec.Struct, frozen=True):
    """One step of a rank, in seconds of the machine's clock: when its passes began and ended, and of each, in
    order, the work."""

    began_s: float
    ended_s: float
    work_s: list[float]


class Report(msgspec.Struct, frozen=True):
    """One rank's times by side, all its steps, and their losses."""

    times_s: dict[str, list[float]]
    steps: dict[str, list[Turned]]
    losses: dict[str, list[float]]
    variables: tuple[tuple[str, str], ...]


class Step:
    """A side on this rank. Marks are taken as phases begin; waits for other ranks are taken out."""

    def __init__(self, name: str, settings: Settings, context: RankContext) -> None:
        self.name = name
        self.steps: list[Turned] = []
        self.losses: list[float] = []
        mesh = device_mesh(Mesh.parse(f"pp={STAGES}"), "cpu")
        model = build_model(
            get_spec(settings.model), TheirPlan.UNSHARDED, mesh, dtype=torch.float32, device=context.device,
            seed=settings.seed, pipeline=PIPELINES[name],
        )  # fmt: skip
        self._marks: list[tuple[float, float]] = []
        self._waited_s = 0.0
        self._step = TrainStep(model, mesh=mesh, on_phase=self._mark)
        portion = Portion.on(mesh, settings.micro_batches)
        ids = ids_of(settings)
        self._batch = portion.cut(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def prepare(self, round_: int) -> None:
        """Every round has the same ids; ranks begin together."""
        dist.barrier()

    def run(self) -> None:
        self._marks.clear()
        self._waited_s, began_s = 0.0, time.monotonic()
        with self._timing_waits():
            self.losses.append(float(self._step(self._batch).loss))
        # a pass lasts from its mark to the next one, less what it waited: what it waits for comes before it
        work = [
            (after[0] - before[0]) - (after[1] - before[1])
            for before, after in zip(self._marks, self._marks[1:], strict=False)
        ]
        self.steps.append(Turned(began_s, self._marks[-1][0], work))

    def _mark(self, phase: Phase) -> None:
        if phase in (Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE):
            self._marks.append((time.monotonic(), self._waited_s))

    @contextmanager
    def _timing_waits(self) -> Iterator[None]:
        wait = dist.Work.wait

        def timed(work: Any, *args: Any) -> Any:
            began_s = time.monotonic()
            done = wait(work, *args)
            self._waited_s += time.monotonic() - began_s
            return done

        with patch.object(dist.Work, "wait", timed):
            yield


def ids_of(settings: Settings) -> Tensor:
    vocab = get_spec(settings.model).vocab_size
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(vocab, (settings.micro_batches, settings.seq + 1), generator=generator)


def worker(context: RankContext, payload: bytes) -> bytes:
    """One rank: all sides, stepped in rounds."""
    settings, _ = sides.unpacked(payload, Settings)
    steps = [Step(name, settings, context) for name in ABOUT]
    times = interleave(steps, settings.rounds, settings.warm_ups, context.note)
    kept = {side.name: side.steps[settings.warm_ups :] for side in steps}
    losses = {side.name: side.losses for side in steps}
    return msgspec.json.encode(Report(times, kept, losses, results.rank_variables()))


def bubbles(pipeline: Pipeline, ranks: list[Turned], micro_batches: int) -> tuple[list[float], list[float]]:
    """Of one round's step, by stage: seconds waited; and as the schedule has them, from what passes took."""
    whole_s = max(rank.ended_s for rank in ranks) - min(rank.began_s for rank in ranks)
    waited = [whole_s - sum(rank.work_s) for rank in ranks]
    took = {
        turn: work_s
        for stage, rank in enumerate(ranks)
        for turn, work_s in zip(pipeline.turns(stage, micro_batches), rank.work_s, strict=True)
    }
    passes = replay(pipeline, took.__getitem__, micro_batches, transfer_s=0.0)
    end_s = max(each.end_s for each in passes)
    said = [sum(gap.end_s - gap.start_s for gap in gaps(passes, stage, end_s)) for stage in range(len(ranks))]
    return waited, said


def measure(settings: Settings) -> Result:
    started, load_before = results.now(), results.load_average()
    reports = sides.launch("benchmarks.pipeline:worker", settings, Report, STAGES)
    found = tuple(side for name in ABOUT for side in _sides(name, reports, settings))
    bar = Bar(BarKind.COST_AT_MOST, WITHIN)
    within = {
        name: compare(
            found, WAITED.format(name), SAID.format(name), bar if name != "GPipe" else None, is_cost=True
        )
        for name in ABOUT
    }
    return Result(
        what=WHAT,
        settings={
            "model": settings.model,
            "pp": STAGES,
            "micro_batches": settings.micro_batches,
            "seq": settings.seq,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups,
            "seed": settings.seed,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.pipeline"), STAGES, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=TextSummary("uniform random ids", "none", settings.seq + 1, 0, 0, ""),
        checks=(sides.agreed({name: each[0] for name, each in reports[0].losses.items()}),),
        sides=found,
        comparisons=(
            *within.values(),
            compare(found, "interleaved", "1F1B"),
            compare(found, "GPipe", "1F1B"),
        ),
        notes=(
            "A bubble is a stage's waiting in one step's passes, on the mean of the stages; as the schedule "
            "has it, it is played from what each pass of that round took, without transfers.",
            "gloo between two processes of one machine; a ranking on NCCL need not be the same.",
        ),
    )


def _sides(name: str, reports: list[Report], settings: Settings) -> list[Side]:
    """The step, its bubble, and that as the schedule has it."""
    rounds = zip(*(report.steps[name] for report in reports), strict=True)
    found = [bubbles(PIPELINES[name], list(ranks), settings.micro_batches) for ranks in rounds]
    times = tuple(tuple(report.times_s[name]) for report in reports)
    waited, said = ((tuple(mean(each[side]) for each in found),) for side in (0, 1))
    return [
        Side(name, ABOUT[name], times, {}, tuple(reports[0].losses[name])),
        Side(WAITED.format(name), "measured", waited),
        Side(SAID.format(name), "played", said),
    ]


if __name__ == "__main__":
    sides.command("pipeline", __doc__, Settings(), ("model", "seq", "micro_batches", "rounds"), measure)
