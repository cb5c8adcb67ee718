"""Does the plan that Shardwise makes train the model? Proved for every causal language model type of
transformers.

    python -m benchmarks.made_plans                  all types at tp 2; writes benchmarks/results/
    python -m benchmarks.made_plans --tp 4           the same at tp 4
    python -m benchmarks.made_plans qwen3 gpt2       these types; prints, writes nothing

The plan is made for the small twin of the default configuration, and proved as `shardwise verify` does:
outputs, loss, every gradient, two optimizer steps. The share that is sharded is of the plan that is made for
the default configuration itself.
"""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version

import torch

from benchmarks.made_plan_results import MadePlans, Reason, Row, summary
from benchmarks.results import command_line, now
from benchmarks.types import asked, parser, shown
from shardwise.core.errors import InputError, ShardwiseError
from shardwise.core.made_plan import MadePlan
from shardwise.core.mesh import Mesh, Role
from shardwise.core.verification import Verification
from shardwise.models.source import ModelSource, find_model
from shardwise.parallel.resolve import resolve
from shardwise.planner.make import Wish, make_plan
from shardwise.report.verify import rows
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

_MOST_REASONS = 3


def main() -> int:
    options = parser("made_plans", __doc__)
    options.add_argument("--tp", type=int, default=2)
    given = options.parse_args()
    types, started, began = asked(given.types), now(), time.perf_counter()
    if types is None:
        return 2
    mesh = Mesh.of({Role.CUTS_TENSORS: given.tp})
    made: dict[str, Row] = {}
    claims: list[Claim] = []
    for name in types:
        made[name], claim = _planned(name, mesh)
        claims += [claim] if claim is not None else []
        print(f"{len(made):3}/{len(types)} {name:28} {made[name].note or 'planned'}", flush=True)

    def show(proved: Verification) -> None:
        name = proved.model.removeprefix("hf:")
        made[name] = _with_proof(made[name], proved)
        print(shown(proved), flush=True)

    verify(claims, mesh=mesh, on_answer=show)
    versions = tuple((name, version(name)) for name in ("shardwise", "torch", "transformers"))
    run = MadePlans(
        command_line("benchmarks.made_plans"),
        round(time.perf_counter() - began, 1),
        given.tp,
        started.isoformat(timespec="seconds"),
        versions,
        tuple(made[name] for name in sorted(made)),
    )
    print(summary(run))
    if not given.types:
        print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


def _planned(name: str, mesh: Mesh) -> tuple[Row, Claim | None]:
    """What is known before ranks run; no claim where there is no plan to prove."""
    row = Row(name)
    try:
        with quietly():
            source = find_model(f"hf:{name}")
            twin = source.small(mesh.tp)
            if twin is None:
                return replace(row, note="no small twin"), None
            plan = make_plan(twin, Wish(mesh))
            _check(twin, plan, mesh)
        row = replace(row, is_planned=True, sequence=plan.sequence, why_not=plan.why_not)
    except ShardwiseError as error:
        return replace(row, note=str(error)), None
    try:
        with quietly():
            whole = make_plan(source, Wish(mesh))
    except ShardwiseError:
        whole = plan  # a default configuration that can't be built: its twin's share
    return _with_share(row, whole), Claim.of(f"hf:{name}", plan.plan, twin=True)


def _check(source: ModelSource, made: MadePlan, mesh: Mesh) -> None:
    """Raises PlanError where the engine refuses the plan: in a rank it would end the run."""
    try:
        resolve(source.build(dtype=torch.float32), made.plan, tp=mesh.tp)
    except InputError as error:
        raise ShardwiseError(f"refused: {error}") from error


def _with_share(row: Row, made: MadePlan) -> Row:
    reasons = (Reason(each.pattern, each.elements / made.parameters, each.reason) for each in made.whole)
    largest = tuple(reason for reason in reasons if reason.share > 0.005)[:_MOST_REASONS]
    return replace(row, parameters=made.parameters, sharded=round(made.sharded, 4), whole=largest)


def _with_proof(row: Row, proved: Verification) -> Row:
    proof = proved.proof
    return replace(
        row,
        verdict=str(proved.verdict),
        is_right=proof is not None and not proved.wrong,
        headline=rows.headline(proved),
        gradients=proof.parameters_compared if proof is not None else 0,
        dtype=proof.dtype if proof is not None else "",
        note=proved.note or "",
    )


@contextmanager
def quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    sys.exit(main())
