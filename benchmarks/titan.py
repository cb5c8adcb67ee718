"""Do torchtitan's models train under torchtitan's own parallelism? Each debug model by each backend, with
sequence parallelism and without, and its mixtures with expert parallelism.

    python -m benchmarks.titan            all; writes benchmarks/results/DATE-titan.json
    python -m benchmarks.titan qwen3      models whose name has this in it; prints, writes nothing

Each is what `shardwise verify own --model titan:FAMILY/FLAVOR?...` does on two ranks of this machine's CPU,
two layers deep and with eight experts. Needs torchtitan: pip install 'shardwise[titan]'.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib.metadata import version

from benchmarks.results import command_line, now
from benchmarks.titan_results import Row, Run
from shardwise.core.mesh import Mesh
from shardwise.core.plan import TheirPlan
from shardwise.core.verification import Verdict, Verification
from shardwise.report.verify import rows
from shardwise.verify.claim import Claim
from shardwise.verify.run import SETTINGS, verify

MESH = Mesh((("tp", 2),))
# a machine that does other work too
TIMEOUT_S = 900.0
DENSE, MIXTURES = (
    ("llama3/debugmodel", "qwen3/debugmodel"),
    ("qwen3/debugmodel_moe", "deepseek_v3/debugmodel", "gpt_oss/debugmodel"),
)
BACKENDS = ("spmd_types", "partial_dtensor", "full_dtensor")


def cases(asked: str) -> Iterator[Row]:
    """What is to be proved, as rows without an answer; what may take ranks down comes last."""
    for experts in (1, 2):
        for model in MIXTURES if experts > 1 else (*DENSE, *MIXTURES):
            for backend in BACKENDS:
                for in_parts in (True, False):
                    if asked in model:
                        yield Row(model, backend, in_parts, experts, "", "", None, 0.0)


def named(row: Row) -> str:
    """The model as a command takes it."""
    changes = [f"backend={row.backend}", "layers=2"]
    changes += [f"sequence_parallel={str(row.sequence_parallel).lower()}"]
    changes += ["experts=8", f"expert_parallel={row.expert_parallel}"] if row.model in MIXTURES else []
    return f"titan:{row.model}?{','.join(changes)}"


def answered(row: Row, each: Verification) -> Row:
    error = each.proof.worst_gradient_error if each.proof is not None else None
    why = "" if each.verdict is Verdict.RIGHT else rows.headline(each)
    return Row(
        row.model, row.backend, row.sequence_parallel, row.expert_parallel, str(each.verdict), why, error,
        each.seconds,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.titan", description=__doc__)
    parser.add_argument("model", nargs="?", default="")
    given, started, began = parser.parse_args(), now(), time.perf_counter()
    asked = {named(row): row for row in cases(given.model)}
    done: dict[str, Row] = {}

    def show(each: Verification) -> None:
        print(f"{each.model}: {each.verdict} {rows.headline(each)}", flush=True)
        done[each.model] = answered(asked[each.model], each)
        if not given.model:  # what was proved stays, should the rest be stopped
            run(started, began, done.values()).write()

    claims = [Claim(model, str(TheirPlan.OWN), str(TheirPlan.OWN)) for model in asked]
    verify(claims, mesh=MESH, also_smallest=True, timeout_s=TIMEOUT_S, on_answer=show)
    if not given.model:
        print(f"wrote {run(started, began, done.values()).write()}; now run python -m benchmarks.tables")
    return 0


def run(started: datetime, began: float, done: Iterable[Row]) -> Run:
    return Run(
        command_line("benchmarks.titan"),
        started.isoformat(timespec="seconds"),
        f"{MESH} on cpu, batch {SETTINGS.batch} and {SETTINGS.batch // 2}, {SETTINGS.seq} tokens each",
        tuple((name, version(name)) for name in ("torch", "torchtitan", "spmd_types")),
        round(time.perf_counter() - began, 1),
        tuple(done),
    )


if __name__ == "__main__":
    sys.exit(main())
