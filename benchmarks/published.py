"""How wrong is predict? Every usable row of published training runs, predicted from the model's Program and a
machine file.

    python -m benchmarks.published                 all rows; writes results/DATE-published.json (10 minutes)
    python -m benchmarks.published --group dgxc    groups whose names hold "dgxc"; writes nothing

What a row is taken for is decided by its configuration alone (`usable`, `job_of`), never by its time. Rows:
benchmarks/data/measurements.csv, each with its source. Constants of the machine files come from
micro-benchmarks (benchmarks/machine_files.py), with two exceptions: the host of the vTrain cluster (fitted to
its rows with TP 1) and what async TP hides (fitted to torchtitan's pairs). The cross-validation predicts each
group without what was fitted to it.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from benchmarks.published_results import Predicted, Published, summary
from benchmarks.results import command_line, now
from shardwise.core.case import StepSettings
from shardwise.core.machine import Machine
from shardwise.core.mesh import Mesh
from shardwise.core.prediction import AttentionKernel, Precision, Prediction, Setup
from shardwise.core.program import Program
from shardwise.predict.machines import load_machine
from shardwise.predict.predict import predict

DATA = Path(__file__).parent / "data" / "measurements.csv"
SHAPE = (
    "layers",
    "hidden",
    "heads",
    "ffn",
    "vocab",
    "seq_len",
    "micro_batch",
    "tp",
    "pp",
    "dp",
    "n_gpus",
    "global_batch",
)
MACHINES = {
    "A100-SXM-80GB": "a100-sxm-80gb",
    "A100-SXM-40GB": "a100-sxm-40gb",
    "H100-SXM-96GB-HBM2e": "h100-sxm-96gb-500w",
    "H100-SXM-95GB-HBM2e": "h100-sxm-96gb-500w",
    "H100-SXM-80GB": "h100-sxm-80gb",
    "H200-SXM-141GB": "h200-sxm-141gb",
    "B200-SXM": "b200-sxm",
    "GB200": "gb200-nvl72",
}
UNFUSED = (
    "Megatron-LM 2021",
    "Megatron-LM 2022",
    "DeepSpeed ZeRO-3",
    "Megatron-DeepSpeed/Megatron-LM (see paper), measured by vTrain authors",
)
FP8 = ("fp8", "float8")
COMPILED_LOSS = "2025-04"
"""Since when torchtitan compiles its loss where it compiles its layers (before, it said that this failed).
Source: its pull request 1033."""

Row = dict[str, str]


def number(row: Row, column: str, absent: int = 0) -> int:
    """A whole number of a column, the first where it names several ("8 or 16"); `absent` where it is
    empty."""
    return int(float(row[column].split()[0])) if row[column] else absent


def usable(row: Row) -> bool:
    """By the configuration only: shapes and degrees stated, dense layers, a GPU with a machine file, a step
    time. fp8 rows are in."""
    stated = all(row[column] for column in SHAPE) and bool(row["step_time_s"])
    return stated and row["ep"] in ("", "0", "1") and row["gpu"] in MACHINES


def is_llama(row: Row) -> bool:
    """Gated feed-forwards, RMSNorm and no biases; all other families are taken for GPT."""
    return "llama" in row["model"]


@dataclass(frozen=True, slots=True)
class Traced:
    """What a Program depends on: rows that agree in it share one."""

    llama: bool
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    seq: int
    max_seq: int
    micro_batch: int
    tp: int
    sequence_parallel: bool
    data_axis: str
    data_size: int
    recompute: str
    mixed: bool
    plan: str
    fused_swiglu: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A row as predict takes it."""

    traced: Traced
    setup: Setup
    machine: str


def job_of(row: Row) -> Job:
    """From the configuration columns, by these rules: Megatron pads its vocabulary to a multiple of 128 x TP,
    and its SwiGLU keeps its inputs alone; context parallelism gives each rank its part of the sequence, and
    its ranks shard and reduce with the data-parallel ones; 2021 and 2022 trainers ran attention unfused;
    torchtitan runs under PyTorch's own styles, and compiles its loss since COMPILED_LOSS; FSDP and ZeRO-3
    keep and reduce in float32 and compute in half precision, others keep float32 gradients and master
    weights; a distributed optimizer is shared by data-parallel and context-parallel ranks, and its reduction
    runs beside the backward."""
    llama, tp, dp, context = is_llama(row), number(row, "tp"), number(row, "dp"), number(row, "cp", 1)
    sharded = "FSDP" in row["dp_kind"] or "ZeRO-3" in row["dp_kind"]
    distributed = "optimizer" in row["dp_kind"]
    vocab, multiple = number(row, "vocab"), 128 * tp
    heads, seq, micro_batch = number(row, "heads"), number(row, "seq_len"), number(row, "micro_batch")
    traced = Traced(
        llama,
        vocab if llama else math.ceil(vocab / multiple) * multiple,
        number(row, "hidden"),
        number(row, "layers"),
        heads,
        number(row, "kv_heads", heads),
        number(row, "ffn"),
        seq // context,
        seq,
        micro_batch,
        tp,
        row["sp"] == "1" and tp > 1,
        "fsdp" if sharded else "dp",
        min(dp * context, 2),
        {"full": "full", "selective-op": "selective-ops"}.get(row["ac"], "none"),
        sharded and dp * context > 1,
        _plan(tp, torchs_own="DTensor" in row["framework"], sharded=sharded),
        llama and not sharded,
    )
    axes = (("pp", number(row, "pp")), (traced.data_axis, dp), ("cp", context), ("tp", tp))
    setup = Setup(
        Mesh(axes),
        micro_batches=number(row, "grad_accum") or number(row, "global_batch") // (dp * micro_batch),
        chunks=number(row, "vp", 1) or 1,
        attention=AttentionKernel.UNFUSED if row["framework"] in UNFUSED else None,
        recompute_attention=row["ac"] == "selective (attn core)",
        compiled=row["compile"] == "1",
        compiled_loss=row["compile"] == "1"
        and "torchtitan" in row["framework"]
        and row["date"] >= COMPILED_LOSS,
        matmul_dtype="float8" if any(name in row["precision"] for name in FP8) else None,
        overlap_data=distributed,
        overlap_tensor=row["tp_overlap"] not in ("", "none"),
        optimizer_shards=dp * context if distributed else 1,
        precision=Precision.TRACED if traced.mixed else Precision.MASTER,
    )
    machine = "a100-sxm-80gb-vtrain" if row["source_group"].startswith("vtrain") else MACHINES[row["gpu"]]
    return Job(traced, setup, machine)


def _plan(tp: int, *, torchs_own: bool, sharded: bool) -> str:
    """A built-in plan, whose loss is Megatron's, or PyTorch's own styles and loss."""
    if tp == 1:
        return "unsharded" if sharded else "replicated"
    return "rowwise@dtensor" if torchs_own else "rowwise"


def program_of(traced: Traced) -> Program:
    """Traces the model's step on CUDA's ops, half precision as bfloat16."""
    from shardwise.models.gpt import GPTConfig
    from shardwise.models.llama import LlamaConfig
    from shardwise.models.specs import ModelSpec
    from shardwise.parallel.plans import load_any_plan
    from shardwise.trace.trace import trace

    shape = traced.vocab, traced.hidden, traced.layers, traced.heads
    if traced.llama:
        config: LlamaConfig | GPTConfig = LlamaConfig(
            *shape, traced.kv_heads, traced.ffn, fused_swiglu=traced.fused_swiglu
        )
    else:
        config = GPTConfig(*shape, traced.ffn, traced.max_seq)
    spec = ModelSpec("published", config, "")
    plan = load_any_plan(traced.plan, sequence_parallel=traced.sequence_parallel, family=spec.family)
    mesh = Mesh(((traced.data_axis, traced.data_size), ("tp", traced.tp)))
    settings = StepSettings(
        traced.micro_batch * traced.data_size, traced.seq, "bfloat16", recompute=traced.recompute
    )
    if traced.mixed:
        settings = replace(settings, dtype="float32", param_dtype="bfloat16", reduce_dtype="float32")
    return trace(spec, plan, mesh, settings, device="cuda")


@cache
def _machine(name: str) -> Machine:
    return load_machine(name)


def predicted(job: Job, program: Program) -> Prediction:
    """What the row's run would take."""
    return predict(program, _machine(job.machine), job.setup)


def left_out(row: Row, job: Job) -> Job:
    """The same job without what was fitted to the row's own group."""
    if row["source_group"] == "vtrain-single":
        return replace(job, machine="a100-sxm-80gb")
    if row["source_group"] == "torchtitan-benchmarks":
        return replace(job, setup=replace(job.setup, overlap_tensor=False))
    return job


def answers(rows: Sequence[tuple[Row, Job]]) -> list[Predicted]:
    """All rows of one Program."""
    program = program_of(rows[0][1].traced)
    found = []
    for row, job in rows:
        made, alone = predicted(job, program), predicted(left_out(row, job), program)
        found.append(
            Predicted(
                group=row["source_group"],
                model=row["model"],
                gpu=row["gpu"],
                gpus=number(row, "n_gpus"),
                tp=number(row, "tp"),
                pp=number(row, "pp"),
                dp=number(row, "dp"),
                micro_batch=number(row, "micro_batch"),
                global_batch=number(row, "global_batch"),
                hidden=number(row, "hidden"),
                layers=number(row, "layers"),
                precision=row["precision"],
                recompute=row["ac"],
                measured_s=float(row["step_time_s"]),
                predicted_s=made.step_s,
                left_out_s=alone.step_s,
                terms=tuple((str(term), seconds) for term, seconds in made.terms if seconds),
                measured_gib=float(row["peak_mem_gib"]) if row["peak_mem_gib"] else None,
                memory_kind=row["mem_kind"],
                active_gib=made.memory.active_bytes / 2**30,
                reserved_gib=made.memory.reserved_bytes / 2**30,
            )
        )
    return found


def by_program(rows: Iterable[Row]) -> list[list[tuple[Row, Job]]]:
    """Rows that share a Program, together."""
    groups: dict[Traced, list[tuple[Row, Job]]] = {}
    for row in rows:
        job = job_of(row)
        groups.setdefault(job.traced, []).append((row, job))
    return list(groups.values())


def read_rows() -> list[Row]:
    with DATA.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--group", default="", help="only groups whose names hold this; nothing is written then"
    )
    parser.add_argument("--processes", type=int, default=2, help="that trace at once")
    given = parser.parse_args()
    rows = [row for row in read_rows() if usable(row) and given.group in row["source_group"]]
    if not rows:
        print(f'no usable row of a group with "{given.group}" in its name', file=sys.stderr)
        return 2
    work, started, began = by_program(rows), now(), time.perf_counter()
    found: list[Predicted] = []
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        for done, part in enumerate(pool.map(answers, work), 1):
            found.extend(part)
            if done % 10 == 0 or done == len(work):
                print(
                    f"{done}/{len(work)} programs, {len(found)} rows, {time.perf_counter() - began:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    run = Published(
        command_line("benchmarks.published"),
        started.isoformat(timespec="seconds"),
        round(time.perf_counter() - began, 1),
        tuple(found),
    )
    print(summary(run))
    if not given.group:
        print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
