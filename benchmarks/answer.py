"""What docs/rowwise-or-colwise.md says of GPUs: predictions for torchtitan's issue 785, in its own settings
and in others, on machines that have NVLink or Infinity Fabric inside a node.

    python -m benchmarks.answer     writes benchmarks/results/DATE-answer.json (three minutes)

Steps: llama3-8b whole, the thread's settings (TP 8, batch 4, sequence 8192, float32, every layer recomputed),
in bfloat16, and with FSDP's mixed precision. Tables: the table of token ids alone (`predict --look-up`), over
tensor-parallel ranks, and over sizes of tables, tokens and texts. Nothing here is measured.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.results import Saved, command_line, now
from shardwise.core.case import Case
from shardwise.core.look_up import LookUpPoint, LookUps
from shardwise.core.prediction import Prediction, Term
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict
from shardwise.verbs.look_up import STYLES, LookUpOptions, look_up
from shardwise.verbs.predict import predict as predict_case

WHAT = "answer"
MACHINES = ("h100-sxm-80gb", "b200-sxm", "mi300x")
THEIRS = ("rowwise@dtensor", "colwise@dtensor")
STEP_PLANS = (*THEIRS, "rowwise", "colwise", "routed")  # FSDP refuses a table whose rows are interleaved
THREAD = {"model": "llama3-8b", "batch": 4, "seq": 8192}
MIXED = {"dtype": "float32", "param_dtype": "bfloat16", "reduce_dtype": "float32"}
SETTINGS = (
    ("the thread's: float32, TP 8", {**THREAD, "mesh": "tp=8", "dtype": "float32", "recompute": "full"}),
    ("bfloat16, TP 8", {**THREAD, "mesh": "tp=8", "dtype": "bfloat16", "recompute": "full"}),
    ("bfloat16, TP 2", {**THREAD, "mesh": "tp=2", "dtype": "bfloat16", "recompute": "full"}),
    (
        "FSDP 8 x TP 8, computed in bfloat16",
        {**THREAD, **MIXED, "batch": 32, "mesh": "fsdp=8,tp=8", "recompute": "full"},
    ),
)
DEGREES = (2, 4, 8, 16, 32, 64)
# vocabulary, hidden width, whether the head is the same matrix, what has them
TABLES = (
    (50_304, 768, False, "GPT-2, padded"),
    (32_000, 4_096, False, "Llama 2 7B"),
    (128_256, 4_096, False, "Llama 3 8B"),
    (128_256, 8_192, False, "Llama 3 70B"),
    (128_256, 2_048, True, "Llama 3.2 1B, tied head"),
    (262_144, 3_840, True, "Gemma 3 12B, tied head"),
)
TOKENS = ((1, 2048), (1, 8192), (4, 8192))
PLACES = (2, 8, 16)


@dataclass(frozen=True, slots=True)
class WholeStep:
    """A predicted step of the whole model."""

    setting: str
    plan: str
    machine: str
    step_s: float
    tokens_per_s_per_device: float
    active_bytes: float
    reserved_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class TablePoint:
    """The table alone: see LookUpPoint. host_s: of step_s."""

    plan: str
    tp: int
    tokens: int
    step_s: float
    host_s: float
    sent_bytes: float
    held_bytes: int
    peak_bytes: float


@dataclass(frozen=True, slots=True)
class TableRun:
    """A table on a machine. about: whose it is. text: whose ids."""

    about: str
    vocab: int
    hidden: int
    machine: str
    dtype: str
    text: str
    points: tuple[TablePoint, ...]


@dataclass(frozen=True, slots=True)
class AnswerRun(Saved):
    """A run of this benchmark."""

    command: str
    started: str
    steps: tuple[WholeStep, ...]
    thread: tuple[TableRun, ...]
    degrees: tuple[TableRun, ...]
    tables: tuple[TableRun, ...]
    texts: tuple[TableRun, ...]
    what: str = WHAT
    schema_version: int = 1


def whole_steps() -> Iterator[WholeStep]:
    """Each plan is traced once in each setting, and predicted on each machine."""
    for setting, keys in SETTINGS:
        case = Case.of(**keys, plans=STEP_PLANS, machine=MACHINES[0])
        done = predict_case(case)
        for step in done.steps:
            for name in MACHINES:
                made = predict(step.layout.program, load_machine(name), step.layout.setup)
                yield _whole(setting, replace(made, plan=step.label))


def _whole(setting: str, made: Prediction) -> WholeStep:
    memory = made.memory
    return WholeStep(
        setting,
        made.plan,
        made.machine,
        made.step_s,
        made.tokens_per_s_per_device,
        memory.active_bytes,
        memory.reserved_bytes,
        memory.fits,
    )


def table_run(
    about: str, keys: dict[str, object], degrees: tuple[int, ...], plans: tuple[str, ...] = STYLES
) -> TableRun:
    """The table of a case's model alone."""
    found = look_up(Case.of(mesh="tp=1", plans=plans, **keys), LookUpOptions(degrees))
    points = tuple(_point(point, found) for point in found.points)
    return TableRun(
        about, found.vocab, found.hidden, found.machine.name, found.settings.dtype, found.text, points
    )


def _point(point: LookUpPoint, found: LookUps) -> TablePoint:
    return TablePoint(
        point.plan,
        point.tp,
        point.batch * found.settings.seq,
        point.step_s,
        dict(point.terms)[Term.LAUNCH],
        point.sent_bytes,
        point.held_bytes,
        point.peak_bytes,
    )


def tables() -> Iterator[TableRun]:
    """Every size of a table, with every number of tokens."""
    for vocab, hidden, is_tied, about in TABLES:
        others = f"n_heads=1,n_kv_heads=1,ffn_hidden=8,tied={str(is_tied).lower()}"
        model = f"llama3-8b?vocab_size={vocab},hidden={hidden},{others}"
        for batch, seq in TOKENS:
            keys = {"model": model, "batch": batch, "seq": seq, "dtype": "bfloat16", "machine": MACHINES[0]}
            yield table_run(about, keys, PLACES)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answer", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--dry", action="store_true", help="write no results file")
    given, started = parser.parse_args(), now()
    thread = {**THREAD, "dtype": "float32"}
    half = {**THREAD, "dtype": "bfloat16"}
    all_plans = (*THEIRS, *STYLES)
    run = AnswerRun(
        command_line("benchmarks.answer"),
        started.isoformat(timespec="seconds"),
        tuple(whole_steps()),
        tuple(
            table_run("Llama 3 8B", {**keys, "machine": name}, (8,), all_plans)
            for keys in (thread, half)
            for name in MACHINES
        ),
        tuple(table_run("Llama 3 8B", {**half, "machine": name}, DEGREES, all_plans) for name in MACHINES),
        tuple(tables()),
        tuple(
            table_run("Llama 3 8B", {**thread, "machine": MACHINES[0], "random_ids": random}, (2, 4, 8))
            for random in (False, True)
        ),
    )
    for step in run.steps:
        about = f"{step.setting:36} {step.plan:20} {step.machine:16}"
        print(f"{about} {step.step_s * 1e3:8.1f} ms, active {step.active_bytes / 2**30:.2f} GiB")
    if not given.dry:
        print(f"written: {run.write()}", file=sys.stderr)


if __name__ == "__main__":
    main()
