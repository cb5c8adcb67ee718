"""What the loop of `shardwise train` costs over the bare step that it turns.

    python -m benchmarks.train_loop           writes benchmarks/results/DATE-train-loop.json
    python -m benchmarks.train_loop --dry     prints, writes nothing

Sides, in the same processes and rounds, fp32, two models of the same weights under the plan rowwise over
tp=2, the same optimizer and clipping: the bare TrainStep on a batch that is there; a step of the loop: the
batch read ahead by position, the learning rate of its step, the look at loss and norm before the update, the
sum over ranks, the line for the log, phases noted for whoever watches, the sentinel every 100 steps.
Checkpoints and validation come in their own time and aren't in it: see benchmarks.checkpoints.
"""

import tempfile
from dataclasses import dataclass, replace

import msgspec
import torch
import torch.distributed as dist

from benchmarks import results, sides
from benchmarks.results import Bar, BarKind, Result, compare
from benchmarks.rounds import Timed, interleave
from shardwise.core.case import PACKED, StepSettings
from shardwise.core.errors import RunError
from shardwise.core.mesh import Mesh
from shardwise.core.training import Decay, Saved, TrainOptions
from shardwise.launch import RankContext
from shardwise.launch.mail import Kind
from shardwise.models.specs import get_spec
from shardwise.parallel.any_plan import plan_from, text_of
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import MicroBatches, Portion
from shardwise.step.train import TrainStep, adamw
from shardwise.text.samples import Samples
from shardwise.text.stream import TokenStream, load_tokens
from shardwise.train.feed import Feed
from shardwise.train.loop import Event, Loop, TrainJob

WHAT, RANKS = "train-loop", 2
BARE, LOOP = "the bare step", "a step of the loop"
MOST = 1.03
MANY = 10**6
EACH = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run. batch: of all ranks together."""

    model: str = "llama3-debug"
    batch: int = 4
    seq: int = 512
    rounds: int = 11
    warm_ups: int = 2
    seed: int = 0


class Report(msgspec.Struct, frozen=True):
    """One rank's times by side, and the losses of all its steps."""

    times_s: dict[str, list[float]]
    losses: dict[str, list[float]]
    variables: tuple[tuple[str, str], ...]


class Bare:
    """The step alone, on the batches that the loop reads; they are made before the clock starts."""

    name = BARE

    def __init__(self, job: TrainJob, samples: Samples) -> None:
        settings, options = job.settings, job.options
        mesh = device_mesh(Mesh.parse(job.mesh), "cpu")
        self._portion, self._samples, self._batch = Portion.on(mesh), samples, settings.batch
        model = build_model(
            get_spec(job.model),
            plan_from(job.plan),
            mesh,
            dtype=torch.float32,
            device=torch.device("cpu"),
            seed=settings.seed,
        )
        optimizer = adamw(
            model,
            learning_rate=settings.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        self._step = TrainStep(model, mesh=mesh, max_norm=settings.max_norm, optimizer=optimizer)
        self.losses: list[float] = []
        self._position = 0
        self._ready: list[MicroBatches] = []

    def prepare(self, round_: int) -> None:
        for _ in range(EACH):
            batch = self._samples.at(self._position, self._batch)
            self._ready.append(self._portion.cut(batch.ids_BS, batch.labels_BS))
            self._position += self._batch
        dist.barrier()

    def run(self) -> None:
        for batch in self._ready:
            self.losses.append(float(self._step(batch).loss))
        self._ready.clear()


class Looped:
    """The same steps, by the loop."""

    name = LOOP

    def __init__(self, loop: Loop, feed: Feed) -> None:
        self._loop, self._feed = loop, feed

    def prepare(self, round_: int) -> None:
        dist.barrier()

    def run(self) -> None:
        for _ in range(EACH):
            self._loop.advance(self._feed)


def worker(context: RankContext, payload: bytes) -> bytes:
    """One rank: both sides, timed in turn."""
    settings, body = sides.unpacked(payload, Settings)
    samples = Samples.of(TokenStream.from_bytes(body), settings.seq, settings.seed)
    losses: list[float] = []

    def keep(event: bytes) -> None:
        record = msgspec.json.decode(event, type=Event).record
        if record is not None:
            losses.append(record.loss)

    with tempfile.TemporaryDirectory() as folder:
        job = job_of(settings, samples.digest, folder)
        listening = replace(context, send=lambda kind, content: keep(content) if kind is Kind.EVENT else None)
        loop, bare = Loop(listening, job, samples), Bare(job, samples)
        with loop.opened() as feed:
            timed: list[Timed] = [bare, Looped(loop, feed)]
            times = interleave(timed, settings.rounds, settings.warm_ups, context.note)
    return msgspec.json.encode(Report(times, {BARE: bare.losses, LOOP: losses}, results.rank_variables()))


def job_of(settings: Settings, digest: str, folder: str) -> TrainJob:
    spec = get_spec(settings.model)
    return TrainJob(
        model=settings.model,
        mesh=f"tp={RANKS}",
        plan=text_of(builtin_plan("rowwise", family=spec.family)),
        settings=StepSettings(batch=settings.batch, seq=settings.seq, seed=settings.seed),
        options=TrainOptions(steps=MANY, decay=Decay.CONSTANT.value, validate_every=0, save_every=0),
        saved=Saved(0, 0, digest, {}, {}, spec.config.n_parameters, RANKS),
        checkpoints=folder,
        documents=PACKED,
    )


def measure(settings: Settings) -> Result:
    started, load_before = results.now(), results.load_average()
    spec = get_spec(settings.model)
    stream = load_tokens(vocab_size=spec.vocab_size, seed=settings.seed)
    reports = sides.launch("benchmarks.train_loop:worker", settings, Report, RANKS, stream=stream)
    losses = reports[0].losses
    count = len(losses[LOOP])  # the last step's line is still open
    if losses[BARE][:count] != losses[LOOP]:
        raise RunError("the two sides' losses differ: they don't train the same.")
    tokens = settings.batch * settings.seq * EACH
    found = [
        sides.joined(name, about, [each.times_s[name] for each in reports], losses[name], tokens)
        for name, about in ((BARE, "TrainStep"), (LOOP, "shardwise train"))
    ]
    return Result(
        what=WHAT,
        settings={
            "model": settings.model,
            "parameters": spec.config.n_parameters,
            "plan": "rowwise",
            "batch": settings.batch,
            "seq": settings.seq,
            "steps a round": EACH,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups,
            "seed": settings.seed,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.train_loop"), RANKS, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=stream.summary,
        checks=(f"The losses of {count} steps are the same on both sides, to the last bit.",),
        sides=tuple(found),
        comparisons=(compare(found, LOOP, BARE, Bar(BarKind.COST_AT_MOST, MOST), is_cost=True),),
        notes=(
            f"A time is that of {EACH} steps. Lines for the log are made, and written by nobody.",
            "gloo between two processes of one machine.",
        ),
    )


if __name__ == "__main__":
    sides.command("train_loop", __doc__, Settings(), ("model", "batch", "seq", "rounds"), measure)
