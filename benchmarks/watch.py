"""What shardwise.watch() costs: a check beside a training step, on two ranks.

    python -m benchmarks.watch             writes benchmarks/results/DATE-watch.json
    python -m benchmarks.watch --dry       prints, writes nothing

Sides, all in the same processes and rounds, fp32, AdamW(fused=True): a step of llama3-debug under the plan
rowwise over tp (replicated: its norms), a check of it; a step of it whole on each of two dp ranks
(replicated: all of it, the most that there is), a check of that. What a step costs with a check every so many
is played from the two of each round; between checks a hook counts, which is one call of Python.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

import shardwise
from benchmarks import results
from benchmarks.results import Bar, BarKind, Result, Side, compare
from benchmarks.rounds import interleave
from shardwise.core.measurement import TextSummary
from shardwise.core.mesh import Mesh
from shardwise.core.plan import AnyPlan, TheirPlan
from shardwise.launch import RankContext, run_ranks
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.step.build import build_model, device_mesh
from shardwise.step.portion import Portion
from shardwise.step.train import TrainStep

WHAT = "watch"
EVERY = 100
LEAST = 1.01
RANKS = 2
MESHES = {"tp=2": "rowwise", "dp=2": "every weight on each rank"}
STEP, CHECK, WATCHED = "{}: a step", "{}: a check", "{}: a step, watched"


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one run. batch: of all ranks together."""

    model: str = "llama3-debug"
    batch: int = 4
    seq: int = 512
    rounds: int = 9
    warm_ups: int = 2
    seed: int = 0


class Report(msgspec.Struct, frozen=True):
    """One rank's times by side; of each mesh, bytes of what is hashed at a check."""

    times_s: dict[str, list[float]]
    hashed_bytes: dict[str, int]
    variables: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Timed:
    """A side on this rank. Ranks begin together."""

    name: str
    call: Callable[[], object]

    def prepare(self, round_: int) -> None:
        dist.barrier()

    def run(self) -> None:
        self.call()


def sides_on(name: str, settings: Settings) -> tuple[list[Timed], int]:
    """A step and a check over one mesh; bytes that a check hashes on this rank."""
    mesh = device_mesh(Mesh.parse(name), "cpu")
    spec = get_spec(settings.model)
    plan: AnyPlan = builtin_plan("rowwise", family=spec.family) if "tp" in name else TheirPlan.UNSHARDED
    model = build_model(spec, plan, mesh, dtype=torch.float32, device=torch.device("cpu"), seed=settings.seed)
    step, portion = TrainStep(model, mesh=mesh), Portion.on(mesh)
    ids = torch.randint(
        spec.vocab_size, (settings.batch, settings.seq + 1), generator=torch.Generator().manual_seed(1)
    )
    batch = portion.cut(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    sentinel = shardwise.watch(model, every=10**9, mesh=mesh)
    given: Tensor = batch[0][0]
    step(batch)
    sides = [
        Timed(STEP.format(name), lambda: step(batch)),
        Timed(CHECK.format(name), lambda: sentinel.check(given)),
    ]
    return sides, sum(each.nbytes for each in sentinel.hashed())


def worker(context: RankContext, payload: bytes) -> bytes:
    settings = msgspec.json.decode(payload, type=Settings)
    found = {name: sides_on(name, settings) for name in MESHES}
    sides = [side for own, _ in found.values() for side in own]
    times = interleave(sides, settings.rounds, settings.warm_ups, context.note)
    hashed = {name: n_bytes for name, (_, n_bytes) in found.items()}
    return msgspec.json.encode(Report(times, hashed, results.rank_variables()))


def measure(settings: Settings) -> Result:
    started, load_before = results.now(), results.load_average()
    replies = run_ranks(
        "benchmarks.watch:worker",
        msgspec.json.encode(settings),
        world_size=RANKS,
        device_type="cpu",
        timeout_s=300.0,
        threads_per_rank=1,
    )
    reports = [msgspec.json.decode(reply, type=Report) for reply in replies]
    sides = [side for name in MESHES for side in _sides(name, reports, settings)]
    bar = Bar(BarKind.COST_AT_MOST, LEAST)
    return Result(
        what=WHAT,
        settings={
            "model": settings.model,
            "parameters": get_spec(settings.model).config.n_parameters,
            "every": EVERY,
            "batch": settings.batch,
            "seq": settings.seq,
            "dtype": "float32",
            "rounds": settings.rounds,
            "warm_ups": settings.warm_ups,
            "seed": settings.seed,
        },
        environment=results.describe_machine(
            results.command_line("benchmarks.watch"), RANKS, 1, reports[0].variables, started
        ),
        load_average=(load_before, results.load_average()),
        text=TextSummary("uniform random ids", "none", settings.batch * (settings.seq + 1), 0, 0, ""),
        checks=tuple(
            f"A check over {name} hashes {reports[0].hashed_bytes[name] / 1e6:.2f} MB on each rank."
            for name in MESHES
        ),
        sides=tuple(sides),
        comparisons=tuple(
            compare(sides, WATCHED.format(name), STEP.format(name), bar, is_cost=True) for name in MESHES
        ),
        notes=(
            f"A watched step is a step and 1/{EVERY} of a check of the same round; between checks a hook "
            "counts.",
            "gloo between two processes of one machine: a check waits for both, a hash is a core's.",
        ),
    )


def _sides(name: str, reports: list[Report], settings: Settings) -> list[Side]:
    step, check = (
        Side(each.format(name), about, tuple(tuple(report.times_s[each.format(name)]) for report in reports))
        for each, about in ((STEP, MESHES[name]), (CHECK, "all that ranks hold alike, and the input"))
    )
    tokens = {"tokens_per_s": settings.batch * settings.seq / step.median_s}
    played = tuple(a + b / EVERY for a, b in zip(step.times_s, check.times_s, strict=True))
    watched = Side(WATCHED.format(name), f"a check every {EVERY} steps, played", (played,))
    return [Side(step.name, step.about, step.rank_times_s, tokens), check, watched]


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.watch", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--model", default=defaults.model)
    for name in ("batch", "seq", "rounds"):
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
