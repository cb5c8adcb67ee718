"""How wrong is predict? Every usable row of published training runs, predicted from the model's Program and a
machine file.

    python -m benchmarks.published                 all rows; writes results/DATE-published.json (10 minutes)
    python -m benchmarks.published --group dgxc    groups whose names hold "dgxc"; writes nothing
    python -m benchmarks.published --again titan   groups whose names hold "titan"; the others stay as the
                                                   newest run has them
    python -m benchmarks.published --over cp,ep    rows over these axes; the others stay as the newest run has
                                                   them

What a row is taken for is decided by its configuration alone (`usable`, `job_of`), never by its time. Rows:
benchmarks/data/measurements.csv, each with its source. Constants of the machine files come from
micro-benchmarks (benchmarks/machine_files.py), with two exceptions: the host of the vTrain cluster (fitted to
its rows with TP 1) and what async TP hides (fitted to torchtitan's pairs). The cross-validation predicts each
group without what was fitted to it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from benchmarks import published_mixtures
from benchmarks.published_jobs import (
    BOARD,
    Job,
    Row,
    Traced,
    by_program,
    left_out,
    machine_called,
    not_taken,
    number,
    read_rows,
    usable,
)
from benchmarks.published_mixtures import TracedMixture
from benchmarks.published_results import Predicted, Published, newest_run, with_others
from benchmarks.published_tables import summary
from benchmarks.results import command_line, now
from shardwise.core.case import StepSettings
from shardwise.core.mesh import Mesh
from shardwise.core.plan import ContextAttention, Engine, Plan
from shardwise.core.prediction import Prediction
from shardwise.core.program import Program
from shardwise.predict.predict import predict


def program_of(traced: Traced | TracedMixture) -> Program:
    """Traces the model's step on CUDA's ops, half precision as bfloat16."""
    if isinstance(traced, TracedMixture):
        return published_mixtures.program_of(traced)
    from torch.utils.checkpoint import set_checkpoint_early_stop

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
    mesh = Mesh(((traced.data_axis, traced.data_size), ("cp", traced.context), ("tp", traced.tp)))
    if isinstance(plan, Plan) and plan.engine is Engine.NATIVE and traced.context > 1:
        plan = replace(plan, context_attention=ContextAttention.RING)
    settings = StepSettings(
        traced.micro_batch * traced.data_size,
        traced.seq,
        "bfloat16",
        recompute=traced.recompute,
        recompute_layers=traced.recompute_layers,
    )
    if traced.mixed:
        settings = replace(settings, dtype="float32", param_dtype="bfloat16", reduce_dtype="float32")
    if traced.gathers_once:  # torchtitan's default for pipelines: parameters stay, gradients are summed once
        settings = replace(settings, reshard_after_forward=False, reduce_once=True)
    # PyTorch's checkpoint stops where the last tensor is there that the backward needs; Megatron's own runs
    # the whole forward again (megatron/core/tensor_parallel/random.py)
    with set_checkpoint_early_stop(traced.data_axis == "fsdp"):
        return trace(spec, plan, mesh, settings, device="cuda")


def predicted(job: Job, program: Program, *, replays: bool = True) -> Prediction:
    """What the row's run would take. replays: see forecast()."""
    machine = machine_called(job.machine)
    if job.per_node is not None:
        within = replace(machine.within, direct=job.per_node if job.per_node <= BOARD else 0)
        machine = replace(machine, devices_per_node=job.per_node, within=within)
    if not job.is_fitted:
        rates = tuple((dtype, replace(rate, unaligned=1.0)) for dtype, rate in machine.matmuls)
        machine = replace(machine, matmuls=rates)
    return predict(program, machine, job.setup, replays=replays)


def answers(rows: Sequence[tuple[Row, Job]]) -> list[Predicted]:
    """All rows of one Program."""
    program = program_of(rows[0][1].traced)
    found = []
    for row, job in rows:
        made = predicted(job, program, replays=bool(row["peak_mem_gib"]))
        alone = predicted(left_out(row, job), program, replays=False)
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
                cp=number(row, "cp", 1) or 1,
                ep=number(row, "ep", 1) or 1,
                seq=number(row, "seq_len"),
                compiled=row["compile"] == "1",
                overlap=row["tp_overlap"],
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--group", default="", help="only groups whose names hold this; nothing is written then"
    )
    parser.add_argument(
        "--over", default="", help="only rows over these axes (cp,ep,pp); others as the newest run has them"
    )
    parser.add_argument(
        "--again", default="", help="only groups whose names hold this; others as the newest run has them"
    )
    parser.add_argument("--processes", type=int, default=2, help="that trace at once")
    given = parser.parse_args()
    axes = tuple(given.over.split(",")) if given.over else ()
    rows = [
        row
        for row in read_rows()
        if usable(row)
        and given.group in row["source_group"]
        and given.again in row["source_group"]
        and (not axes or any(number(row, axis, 1) > 1 for axis in axes))
    ]
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
    command, before_s = command_line("benchmarks.published"), 0.0
    if axes or given.again:
        before = newest_run()
        found = with_others(found, before.rows)
        command, before_s = f"{before.command}; {command}", before.seconds
    run = Published(
        command,
        started.isoformat(timespec="seconds"),
        round(before_s + time.perf_counter() - began, 1),
        tuple(found),
        tuple(not_taken(read_rows())),
    )
    print(summary(run))
    if not given.group:
        print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
