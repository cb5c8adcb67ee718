"""Every causal language model type of transformers: is its training step explained, unsharded and under its
own tensor-parallel plan?

    python -m benchmarks.hf_sweep                  all types; writes benchmarks/results/DATE-hf-explain.json
    python -m benchmarks.hf_sweep qwen3 mixtral    these types; prints, writes nothing

Each type is built from its default configuration at two layers, with its widths as they are (nothing is
allocated), under the name by which anyone can try it again: `hf:TYPE?num_hidden_layers=2`. QUERIES has the
exceptions. Its step is traced and explained unsharded, then under plan `hf` as rank 0 of TP. A type counts
only where what came out is plausible: check() and check_flops(). Types run in worker processes; one that
takes too long is ended and noted.
"""

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from benchmarks.hf_results import Answer, Row, Step, Sweep, summary
from benchmarks.results import command_line, now
from shardwise.core.case import StepSettings
from shardwise.core.errors import ShardwiseError
from shardwise.core.explanation import Explanation
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.program import OpKind, Phase, Program
from shardwise.core.shown import shown, told

if TYPE_CHECKING:
    from shardwise.models.source import ModelSource

DEVICE = "cpu"
TP = 2
BATCH, SEQ = 2, 32
WORKERS = 2
TWO_LAYERS = "num_hidden_layers=2"
_HEAD_ALONE = (
    "its plan shards the head alone, which the default ties to a table that isn't sharded: no step runs "
    "under it then"
)
_HEAD_DIM = "the default says no head_dim; this is hidden size over heads"
# What a type is built with where two layers alone don't do, and why.
QUERIES = {
    "blt": ("", "its layers are those of four parts"),
    "deepseek_v2": (
        f"{TWO_LAYERS},num_experts_per_tok=6,moe_intermediate_size=1408",
        "the default says no number of experts per token, and a width of 1407, which grouped_mm refuses; "
        "these are DeepSeek-V2-Lite's",
    ),
    "dots1": (
        f"{TWO_LAYERS},n_routed_experts=128,n_shared_experts=2,num_experts_per_tok=6",
        "the default says no numbers of experts; these are dots.llm1's",
    ),
    "gpt_neo": ("", "its attention_types name exactly 24 layers"),
    "hunyuan_v1_dense": (f"{TWO_LAYERS},head_dim=128", _HEAD_DIM),
    "hunyuan_v1_moe": (f"{TWO_LAYERS},head_dim=128", _HEAD_DIM),
    "lfm2": (f"{TWO_LAYERS},tie_word_embeddings=false", _HEAD_ALONE),
    "lfm3": (f"{TWO_LAYERS},tie_word_embeddings=false", _HEAD_ALONE),
    "longcat_flash": ("num_layers=2", "its depth has a name of its own"),
    "ministral": (f"{TWO_LAYERS},head_dim=128", _HEAD_DIM),
    "nemotron": (
        f"{TWO_LAYERS},num_key_value_heads=48",
        "the default says no number of KV heads; this is one for each head",
    ),
    "nemotron_h": (
        "moe_intermediate_size=7680",
        "its depth is a list of four kinds of layer; half of its width 7688 is one that grouped_mm refuses",
    ),
    "prophetnet": ("num_encoder_layers=2,num_decoder_layers=2", "it has an encoder and a decoder"),
    "reformer": (f"{TWO_LAYERS},is_decoder=true", "it is a decoder only if asked for"),
    "zamba": ("num_hidden_layers=8", "two hybrid layers, which share a block; with fewer it can't tie them"),
    "zamba2": ("", "its layer kinds are a list of 54"),
}


_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.CLIP, Phase.OPTIMIZER)


class ImplausibleError(ShardwiseError):
    """A program that was made without an error, and can't be right."""


@dataclass(slots=True)
class _Worker:
    """A process that examines one type after the other; `job`: the one in hand, and when it must be done."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: tuple[str, float] | None = None


def model_name(model_type: str) -> str:
    """How a command names the form of a type that is tried."""
    query, _ = QUERIES.get(model_type, (TWO_LAYERS, ""))
    return f"hf:{model_type}?{query}" if query else f"hf:{model_type}"


def examine(model_type: str, dtype_name: str) -> Row:
    """One type, in this process, which must have joined no process group."""
    import torch

    from shardwise.models.source import find_model

    name = model_name(model_type)
    began = time.perf_counter()
    parameters = step = plan_step = None
    explained = under_plan = Answer.NO
    reason = plan_reason = ""
    try:
        source = find_model(name)
        model = source.build(dtype=getattr(torch, dtype_name))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        step = explained_step(source, TheirPlan.UNSHARDED, dtype_name)
        explained = Answer.YES
        if not model.tp_plan:
            under_plan = Answer.NO_PLAN
    except Exception as error:
        reason = plan_reason = _reason(error)
    if step is not None and under_plan is not Answer.NO_PLAN:
        try:
            plan_step = explained_step(source, TheirPlan.HF, dtype_name)
            check_flops(step, plan_step)
            under_plan = Answer.YES
        except Exception as error:
            plan_reason = _reason(error)
    _, note = QUERIES.get(model_type, ("", ""))
    seconds = round(time.perf_counter() - began, 2)
    return Row(
        model_type,
        name,
        note,
        parameters,
        explained,
        reason,
        step,
        under_plan,
        plan_reason,
        plan_step,
        seconds,
    )


def explained_step(source: "ModelSource", plan: TheirPlan, dtype_name: str) -> Step:
    """What `shardwise explain` finds, counted. Raises what it raises, and ImplausibleError."""
    from shardwise.explain.explain import explain
    from shardwise.trace.trace import trace

    mesh = Mesh((("tp", 1 if plan is TheirPlan.UNSHARDED else TP),))
    program = trace(source, plan, mesh, StepSettings(batch=BATCH, seq=SEQ, dtype=dtype_name), device=DEVICE)
    explanation = explain(program)
    check(program, explanation)
    unknown = Counter(op.name for op in program.ops() if op.kind is OpKind.UNKNOWN)
    return Step(
        ops=sum(phase.ops for phase in explanation.phases),
        flops=sum(phase.flops for phase in explanation.phases),
        unknown=tuple(sorted(unknown.items())),
        collectives=sum(group.count for group in explanation.collectives),
        wire_bytes=explanation.wire_bytes,
        sharded=explanation.sharded_share,
    )


def check(program: Program, explanation: Explanation) -> None:
    """Raises ImplausibleError where a program can't be that of a training step, or its explanation leaves
    something out."""
    phases = {totals.phase: totals for totals in explanation.phases}
    missing = [phase for phase in _PHASES if phase not in phases]
    if missing:
        raise ImplausibleError(f"nothing runs in {', '.join(missing)}.")
    idle = [phase for phase in (Phase.FORWARD, Phase.BACKWARD) if not phases[phase].flops]
    if idle:
        raise ImplausibleError(f"no op of {' and '.join(idle)} has FLOPs.")
    held = sum(prod(holding.shape) for holding in program.holdings)
    if held != program.parameters:
        raise ImplausibleError(f"{held} parameters are held of {program.parameters}.")
    on_tp = {group.phase for group in explanation.collectives if group.axis == "tp"}
    if explanation.sharded_share and not {Phase.FORWARD, Phase.BACKWARD} <= on_tp:
        raise ImplausibleError(
            f"{explanation.sharded_share:.1%} of the parameters are sharded, and forward or backward sends "
            "nothing."
        )
    if sum(group.count for group in explanation.collectives) != sum(1 for _ in program.collectives()):
        raise ImplausibleError("the explanation has other collectives than the program.")


def check_flops(unsharded: Step, under_plan: Step) -> None:
    """Raises ImplausibleError where a rank of TP does less than its share of the arithmetic, or more than all
    of it."""
    if not unsharded.flops <= TP * under_plan.flops <= TP * unsharded.flops:
        raise ImplausibleError(
            f"a rank's share of the FLOPs is {under_plan.flops / unsharded.flops:.3f} at tp={TP}."
        )


def _reason(error: Exception) -> str:
    return shown(error, 500) if isinstance(error, ShardwiseError) else told(error, 240)


def _serve(connection: Connection, dtype_name: str) -> None:
    """A worker process: types in, rows out, until the pipe ends."""
    warnings.simplefilter("ignore")
    logging.disable(
        logging.ERROR
    )  # transformers' and the fake tensors' own accounts of what the row says in a line
    while True:
        try:
            connection.send(examine(connection.recv(), dtype_name))
        except (EOFError, KeyboardInterrupt):
            return


def sweep_types(types: Sequence[str], dtype_name: str, timeout_s: float) -> Iterator[Row]:
    """Rows as they come. A worker that takes longer than timeout_s for a type, or dies over it, is ended and
    replaced."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(types))
    workers: list[_Worker] = []

    def started() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, dtype_name), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def give(worker: _Worker, spare_s: float) -> None:
        if waiting:
            worker.job = (waiting.pop(), time.monotonic() + timeout_s + spare_s)
            worker.connection.send(worker.job[0])

    try:
        while waiting or any(worker.job for worker in workers):
            while waiting and len(workers) < WORKERS:
                workers.append(started())
                give(workers[-1], spare_s=60)  # it imports first
            busy = [worker for worker in workers if worker.job]
            next_end = min(worker.job[1] for worker in busy if worker.job)
            ready = wait(
                [worker.connection for worker in busy], timeout=max(0.0, next_end - time.monotonic())
            )
            for worker in busy:
                assert worker.job is not None
                model_type, deadline = worker.job
                worker_died = False
                if worker.connection in ready:
                    try:
                        yield worker.connection.recv()
                        worker.job = None
                        give(worker, spare_s=0)
                        continue
                    except EOFError:
                        worker_died = True
                if worker_died or time.monotonic() >= deadline:
                    worker.process.kill()
                    worker.process.join()
                    workers.remove(worker)
                    what = (
                        f"its process ended with code {worker.process.exitcode}"
                        if worker_died
                        else f"no answer within {timeout_s:g} s"
                    )
                    _, note = QUERIES.get(model_type, ("", ""))
                    yield Row(
                        model_type,
                        model_name(model_type),
                        note,
                        None,
                        Answer.NO,
                        what,
                        None,
                        Answer.NO,
                        what,
                        None,
                        timeout_s,
                    )
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hf_sweep", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("types", nargs="*", help="these types only; nothing is written then")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for a type, both attempts together"
    )
    given = parser.parse_args()
    from shardwise.models.hugging_face import causal_types

    known = causal_types()
    unknown = [name for name in given.types if name not in known]
    if unknown:
        print(f"no causal language model types: {', '.join(unknown)}", file=sys.stderr)
        return 2
    types, started = given.types or known, now()
    rows: list[Row] = []
    for row in sweep_types(types, given.dtype, given.timeout):
        rows.append(row)
        why = row.reason or row.plan_reason
        print(
            f"{len(rows):3}/{len(types)} {row.model_type:28} {row.explained:4} {row.under_its_plan:8} "
            f"{row.seconds:6.1f} s  {why}"
        )
    packages = ("shardwise", "torch", "transformers")
    rows.sort(key=lambda row: row.model_type)
    sweep = Sweep(
        command_line("benchmarks.hf_sweep"),
        started.isoformat(timespec="seconds"),
        given.dtype,
        TP,
        BATCH,
        SEQ,
        tuple((name, version(name)) for name in packages),
        tuple(rows),
    )
    print(summary(sweep))
    if not given.types:
        print(f"wrote {sweep.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
