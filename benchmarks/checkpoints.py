"""What a checkpoint costs a training run: a save that it waits for, against one that is written beside it.

    python -m benchmarks.checkpoints           writes benchmarks/results/DATE-checkpoints.json
    python -m benchmarks.checkpoints --dry     prints, writes nothing

Sides, all in the same processes and rounds, on two ranks that shard the parameters (fsdp=2), fp32, AdamW with
both moments: a save until it is published (every byte written, hashed and fsynced); what a save beside the
training keeps the loop from going on; so many steps alone; as many steps with a save beside them, until it is
published. What all of it costs is played from the last two of each round: what the steps lose while a thread
writes, and the wait. torch.distributed.checkpoint's save and async_save of the same state write to the same
disk, and make no digests.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from benchmarks import results
from benchmarks.results import Bar, BarKind, Result, Side, compare
from benchmarks.rounds import interleave
from shardwise.core.measurement import TextSummary
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.training import Saved
from shardwise.launch import RankContext, run_ranks
from shardwise.models.specs import get_spec
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep
from shardwise.train.checkpoints import Checkpoints

WHAT = "checkpoints"
RANKS, MESH = 2, Mesh.parse("fsdp=2")
MOST = 0.1
WAITED, CALL, STEPS, BESIDE = "a save, waited for", "a save beside: the call", "steps", "steps, a save beside"
LOST = "a save beside: all that it costs"
DCP, DCP_CALL = "dcp.save", "dcp.async_save: the call"


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run. batch: of all ranks together. steps: while a save is written."""

    model: str = "llama3-debug"
    batch: int = 4
    seq: int = 32
    steps: int = 8
    rounds: int = 11
    warm_ups: int = 1
    seed: int = 0


class Report(msgspec.Struct, frozen=True):
    """One rank's times by side, and bytes of a checkpoint."""

    times_s: dict[str, list[float]]
    size: int
    variables: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Timed:
    """A side on this rank. Ranks begin together, with nothing being written. after: isn't timed."""

    name: str
    call: Callable[[], object]
    after: Callable[[], object]

    def prepare(self, round_: int) -> None:
        self.after()
        dist.barrier()

    def run(self) -> None:
        self.call()


@contextmanager
def one_folder() -> Iterator[Path]:
    """The same on all ranks."""
    made = [tempfile.mkdtemp(prefix="shardwise-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    try:
        yield Path(made[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(made[0])


def worker(context: RankContext, payload: bytes) -> bytes:
    settings = msgspec.json.decode(payload, type=Settings)
    mesh, spec = device_mesh(MESH, "cpu"), get_spec(settings.model)
    model = build_model(
        spec, TheirPlan.UNSHARDED, mesh, dtype=torch.float32, device=torch.device("cpu"), seed=settings.seed
    )
    step, portion = TrainStep(model, mesh=mesh), Portion.on(mesh)
    ids = torch.randint(
        spec.vocab_size, (settings.batch, settings.seq + 1), generator=torch.Generator().manual_seed(1)
    )
    batch = portion.cut(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    step(batch)
    with one_folder() as folder:
        sides, checkpoints = sides_in(folder, settings, step, lambda: step(batch))
        times = interleave(sides, settings.rounds, settings.warm_ups, context.note)
        for side in sides:
            side.after()
        outcome = checkpoints.finish()
        assert outcome is not None
        assert not checkpoints.lines()
    return msgspec.json.encode(Report(times, outcome.size, results.rank_variables()))


def sides_in(
    folder: Path, settings: Settings, step: TrainStep, train: Callable[[], object]
) -> tuple[list[Timed], Checkpoints]:
    checkpoints, numbers, theirs = Checkpoints(folder / "ours", keep=1, mesh=MESH), count(1), folder / "dcp"
    being_written: list[object] = []

    def save(wait: bool) -> None:
        number = next(numbers)
        saved = Saved(number, number, "", {}, {}, 1, RANKS)
        checkpoints.save(number, step.model, step.optimizer, saved, wait=wait)

    def steps() -> None:
        for _ in range(settings.steps):
            train()

    def steps_beside() -> None:
        save(False)
        steps()
        checkpoints.finish()

    def state() -> dict[str, object]:
        weights, optimizer = get_state_dict(step.model, step.optimizer)
        return {"model": weights, "optimizer": optimizer}

    def dcp_async() -> None:
        being_written.append(dcp.async_save(state(), checkpoint_id=theirs / str(next(numbers))))

    def settled() -> None:
        checkpoints.finish()
        while being_written:
            being_written.pop().result()  # type: ignore[attr-defined]
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(theirs, ignore_errors=True)

    calls: dict[str, Callable[[], object]] = {
        WAITED: lambda: save(True),
        CALL: lambda: save(False),
        STEPS: steps,
        BESIDE: steps_beside,
        DCP: lambda: dcp.save(state(), checkpoint_id=theirs / str(next(numbers))),
        DCP_CALL: dcp_async,
    }
    return [Timed(name, call, settled) for name, call in calls.items()], checkpoints


def measure(settings: Settings) -> Result:
    started, load_before = results.now(), results.load_average()
    replies = run_ranks(
        "benchmarks.checkpoints:worker",
        msgspec.json.encode(settings),
        world_size=RANKS,
        device_type="cpu",
        timeout_s=300.0,
        threads_per_rank=1,
    )
    reports = [msgspec.json.decode(reply, type=Report) for reply in replies]
    sides = sides_of(reports, settings)
    return Result(
        what=WHAT,
        settings={
            "model": settings.model,
            "parameters": get_spec(settings.model).config.n_parameters,
            "mesh": str(MESH),
            "batch": settings.batch,
            "seq": settings.seq,
            "steps": settings.steps,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups,
            "seed": settings.seed,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.checkpoints"), RANKS, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=TextSummary("uniform random ids", "none", settings.batch * (settings.seq + 1), 0, 0, ""),
        checks=(f"A checkpoint has {reports[0].size / 1e6:.0f} MB.",),
        sides=tuple(sides),
        comparisons=(
            compare(sides, CALL, WAITED, Bar(BarKind.COST_AT_MOST, MOST), is_cost=True),
            compare(sides, LOST, WAITED, None, is_cost=True),
            compare(sides, CALL, DCP_CALL, None, is_cost=True),
            compare(sides, WAITED, DCP, None, is_cost=True),
        ),
        notes=(
            "All that a save beside costs: so many steps with one, less as many alone, in the same round. "
            "Ranks have all of the cores, so the thread that hashes and writes takes their time.",
            "dcp.save writes no digests.",
        ),
    )


def sides_of(reports: list[Report], settings: Settings) -> list[Side]:
    def side(name: str, about: str) -> Side:
        return Side(name, about, tuple(tuple(report.times_s[name]) for report in reports))

    steps, beside = side(STEPS, f"{settings.steps} of them"), side(BESIDE, "until it is published")
    lost = tuple(max(0.0, b - a) for a, b in zip(steps.times_s, beside.times_s, strict=True))
    return [
        side(WAITED, "written, hashed, fsynced, published"),
        side(CALL, "copied to host memory"),
        steps,
        beside,
        Side(LOST, "played", (lost,)),
        side(DCP, "torch.distributed.checkpoint"),
        side(DCP_CALL, "torch.distributed.checkpoint"),
    ]


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--model", default=defaults.model)
    for name in ("batch", "seq", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--dry", action="store_true", help="print, and write no results file")
    arguments = vars(parser.parse_args())
    is_dry = arguments.pop("dry")
    result = measure(Settings(**arguments))
    results.show(result)
    for line in result.checks:
        print(line)
    if not is_dry:
        print(result.write())


if __name__ == "__main__":
    main()
