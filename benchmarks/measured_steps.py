"""Predictions beside what ran: steps of one rank's part on an H100 and an H200 (no communication), and the
embedding of torchtitan's issue #785 on 8 H100.

    python -m benchmarks.measured_steps    writes benchmarks/results/DATE-measured-steps.json (two minutes)

Steps: benchmarks/data/h100-steps.json and h200-steps.json, which benchmarks/gpu_steps.py wrote. The issue:
llama3-8b, TP 8, batch 4, sequence 8192, float32; its figures are a user's, read off profiles. What is
predicted there comes from a machine file none of whose constants is of that issue.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.hf_results import table
from benchmarks.results import RESULTS, as_json, command_line, latest, now, write_results
from shardwise.core.case import StepSettings
from shardwise.core.collective import CollectiveKind
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import Filling, Prediction, Setup, Term
from shardwise.core.program import Collective, MemoryKind, OpKind, Phase, Program
from shardwise.predict.costs import collective_cost, collective_s, op_cost
from shardwise.predict.groups import RankGroup
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict
from shardwise.predict.traced import traced_mesh

WHAT = "measured-steps"
STEPS = {
    "h100-sxm-80gb": Path(__file__).parent / "data" / "h100-steps.json",
    "h200-sxm-141gb": Path(__file__).parent / "data" / "h200-steps.json",
}
# what the issue's figures are, in ms
ISSUE = (
    ("look-up, colwise", 0.104),
    ("look-up, rowwise", 0.788),
    ("reduce-scatter, rowwise", 1.456),
    ("all-to-all, colwise", 7.142),
)

NODE = RankGroup(((1, 8),))


@dataclass(frozen=True, slots=True)
class Step:
    """One step that ran, and its prediction. launch_share: of the predicted step spent waiting for
    launches."""

    device: str
    tag: str
    measured_s: float
    predicted_s: float
    launch_share: float
    measured_active_gib: float
    predicted_active_gib: float
    measured_reserved_gib: float
    predicted_reserved_gib: float = 0.0
    kinds: tuple[tuple[str, float], ...] = ()  # GiB of the predicted active memory, by kind

    @property
    def active_error(self) -> float:
        return self.predicted_active_gib / self.measured_active_gib - 1

    @property
    def reserved_error(self) -> float:
        return self.predicted_reserved_gib / self.measured_reserved_gib - 1


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of the issue, and what is predicted (transfer only, for collectives), in ms."""

    what: str
    measured_ms: float | None
    predicted_ms: float


@dataclass(frozen=True, slots=True)
class Steps:
    """A run of this benchmark."""

    command: str
    started: str
    steps: tuple[Step, ...]
    issue: tuple[Line, ...]
    what: str = WHAT
    schema_version: int = 1

    @property
    def day(self) -> str:
        return self.started[:10]


def newest_run(folder: Path = RESULTS) -> Steps:
    """Raises FileNotFoundError where there is none."""
    return msgspec.json.decode(latest(WHAT, folder).read_bytes(), type=Steps)


def program_of(model: str, layers: int | None, plan: str, mesh: Mesh, settings: StepSettings) -> Program:
    """Of rank 0 on CUDA."""
    from shardwise.models.source import find_model
    from shardwise.parallel.plans import load_any_plan
    from shardwise.trace.trace import trace

    source = find_model(model)
    if layers is not None:
        source = source.with_layers(layers)  # type: ignore[attr-defined]
    return trace(
        source,
        load_any_plan(plan, sequence_parallel=True, family=source.family),
        mesh,
        settings,
        device="cuda",
    )


def prediction_of(ran: "Ran", machine: Machine) -> Prediction:
    """The step that ran, predicted without communication."""
    whole = Mesh((("fsdp", ran.fsdp), ("tp", ran.tp)))
    mesh = traced_mesh(whole)
    settings = StepSettings(
        ran.batch * mesh.data_parallel,
        ran.seq,
        ran.dtype,
        ran.param_dtype,
        ran.reduce_dtype,
        recompute=ran.recompute,
    )
    return predict(
        program_of(ran.model, ran.layers, ran.plan, mesh, settings),
        machine,
        Setup(
            whole,
            compiled=ran.compiled,
            compiled_loss=ran.compiled_loss,
            filled=Filling.WHOLE,
            without=(Term.TENSOR, Term.DATA),
        ),
    )


def step_of(ran: dict[str, object], machine: Machine) -> Step:
    """The same step, predicted without communication."""
    values = msgspec.convert(ran, Ran)
    made = prediction_of(values, machine)
    return Step(
        values.device,
        values.tag,
        median(values.steps),
        made.step_s,
        dict(made.terms)[Term.LAUNCH] / made.step_s,
        values.active / 2**30,
        made.memory.active_bytes / 2**30,
        values.reserved / 2**30,
        made.memory.reserved_bytes / 2**30,
        tuple((str(kind), n_bytes / 2**30) for kind, n_bytes in made.memory.by_kind),
    )


class Ran(msgspec.Struct):
    """A step of the results file."""

    tag: str
    model: str
    layers: int
    tp: int
    plan: str
    batch: int
    seq: int
    dtype: str
    recompute: str
    steps: list[float]
    active: int
    reserved: int
    device: str
    fsdp: int
    param_dtype: str | None
    reduce_dtype: str | None
    compiled: bool = False
    compiled_loss: bool = False


def issue_lines(machine: Machine) -> tuple[Line, ...]:
    """What the issue's user measured, and what routed would send there."""
    settings, setup = StepSettings(4, 8192, "float32"), Setup()
    programs = {
        plan: program_of("llama3-8b", None, plan, Mesh((("tp", 8),)), settings)
        for plan in ("colwise@dtensor", "rowwise@dtensor")
    }
    measured = dict(ISSUE)
    lines = [
        Line(
            f"look-up, {plan.partition('@')[0]}",
            measured[f"look-up, {plan.partition('@')[0]}"],
            _look_up_s(program, machine, setup) * 1e3,
        )
        for plan, program in programs.items()
    ]
    scatter = _first(programs["rowwise@dtensor"], CollectiveKind.REDUCE_SCATTER)
    exchange = _first(programs["colwise@dtensor"], CollectiveKind.ALL_TO_ALL)
    for what, each in (("reduce-scatter, rowwise", scatter), ("all-to-all, colwise", exchange)):
        lines.append(Line(what, measured[what], collective_cost(each, machine, setup, NODE).device_s * 1e3))
    for plan in ("routed", "routed-interleaved"):
        routed = _first(_routed(plan, settings), CollectiveKind.ALL_TO_ALL)
        assert routed.by_data is not None
        for who, sent in (
            ("mean rank", routed.by_data.mean_bytes),
            ("hottest rank", routed.by_data.max_bytes),
        ):
            seconds = collective_s(machine, CollectiveKind.ALL_TO_ALL, sent, routed.call.payload_bytes, NODE)
            lines.append(Line(f"all-to-all, {plan}, {who}", None, seconds * 1e3))
    return tuple(lines)


def _look_up_s(program: Program, machine: Machine, setup: Setup) -> float:
    ops = (op for op in program.ops() if op.kind is OpKind.EMBEDDING and op.phase is Phase.FORWARD)
    return op_cost(next(ops), machine, setup).device_s


def _first(program: Program, kind: CollectiveKind) -> Collective:
    return next(
        each for each in program.collectives() if each.call.kind is kind and each.module == "tok_embeddings"
    )


def _routed(plan: str, settings: StepSettings) -> Program:
    """On real text, since its token ids decide."""
    from shardwise.models.source import find_model
    from shardwise.parallel.builtin import builtin_plan
    from shardwise.text.batches import Batches
    from shardwise.text.stream import load_tokens
    from shardwise.trace.trace import trace

    source = find_model("llama3-8b")
    stream = load_tokens(
        vocab_size=source.vocab_size or 0,
        files=[],
        tokenizer=None,
        random_ids=False,
        seed=0,
        progress=lambda _: None,
    )
    ids = Batches(stream, settings.batch, settings.seq).at(0).ids_BS
    return trace(source, builtin_plan(plan), Mesh((("tp", 8),)), settings, device="cuda", ids=ids)


def blocks(run: Steps) -> dict[str, str]:
    """Name of a block of the documents -> its text."""
    source = f"\nSource: `benchmarks/results/{run.day}-{run.what}.json`, made by `{run.command}`.\n"
    errors = [abs(step.predicted_s / step.measured_s - 1) for step in run.steps]
    bound = [step for step in run.steps if step.launch_share > 0.1]
    told = (
        f"{len(run.steps)} steps; median absolute error {median(errors):.1%}, {len(bound)} launch-bound.\n\n"
    )
    steps = [
        [
            step.device.split()[1],
            step.tag,
            f"{step.measured_s * 1e3:.1f} ms",
            f"{step.predicted_s * 1e3:.1f} ms",
            f"{step.predicted_s / step.measured_s - 1:+.1%}",
            f"{step.launch_share:.0%}",
        ]
        for step in run.steps
    ]
    issue = [
        [
            line.what,
            f"{line.measured_ms:.3f} ms" if line.measured_ms is not None else "–",
            f"{line.predicted_ms:.3f} ms",
            f"{line.predicted_ms / line.measured_ms - 1:+.0%}" if line.measured_ms is not None else "–",
        ]
        for line in run.issue
    ]
    head = ["GPU", "step", "measured", "predicted", "error", "launch-bound"]
    return {
        "benchmark-h100-steps": told + table(head, steps, numbers=(2, 3, 4, 5)) + source,
        "benchmark-steps-memory": _memory(run) + source,
        "benchmark-steps-kinds": _kinds(run) + source,
        "benchmark-issue-785": table(
            ["what", "measured there", "predicted", "error"], issue, numbers=(1, 2, 3)
        )
        + source,
    }


def _memory(run: Steps) -> str:
    """Active and reserved, measured and predicted."""
    errors = {
        what: [abs(error) for error in found]
        for what, found in (
            ("active", [step.active_error for step in run.steps]),
            ("reserved", [step.reserved_error for step in run.steps]),
        )
    }
    words = [
        f"{what}: median absolute error {median(found):.1%}, at most {max(found):.1%}, within 8 % "
        f"{sum(error <= 0.08 for error in found)} of {len(found)}"
        for what, found in errors.items()
    ]
    rows = [
        [
            step.device.split()[1],
            step.tag,
            f"{step.measured_active_gib:.2f} GiB",
            f"{step.active_error:+.1%}",
            f"{step.measured_reserved_gib:.2f} GiB",
            f"{step.predicted_reserved_gib:.2f} GiB",
            f"{step.reserved_error:+.1%}",
            f"{step.measured_reserved_gib / step.measured_active_gib:.2f}",
        ]
        for step in run.steps
    ]
    head = ["GPU", "step", "active, measured", "error", "reserved, measured", "predicted", "error"]
    made = table([*head, "reserved over active"], rows, numbers=(2, 3, 4, 5, 6, 7))
    return f"{'; '.join(words)}.\n\n{made}"


def _kinds(run: Steps) -> str:
    """What the predicted memory is made of."""
    names = list(dict.fromkeys(str(kind) for kind in MemoryKind))
    found = [name for name in names if any(name in dict(step.kinds) for step in run.steps)]
    rows = []
    for step in run.steps:
        kinds = dict(step.kinds)
        cells = [f"{kinds[name]:.2f}" if name in kinds else "–" for name in found]
        slack = step.predicted_reserved_gib - step.predicted_active_gib
        rows.append([step.device.split()[1], step.tag, *cells, f"{slack:.2f}"])
    return table(["GPU", "step, in GiB", *found, "slack"], rows, numbers=tuple(range(2, len(found) + 3)))


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.measured_steps", description=(__doc__ or "").partition("\n\n")[0]
    ).parse_args()
    started = now()
    steps = tuple(
        step_of(each, load_machine(name))
        for name, path in STEPS.items()
        for each in json.loads(path.read_text(encoding="utf-8"))["steps"]
    )
    issue = issue_lines(load_machine("h100-sxm-80gb-torch2.6"))
    run = Steps(
        command_line("benchmarks.measured_steps"), started.isoformat(timespec="seconds"), steps, issue
    )
    for text in blocks(run).values():
        print(text)
    print(f"wrote {write_results(as_json(run), run.day, run.what)}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
