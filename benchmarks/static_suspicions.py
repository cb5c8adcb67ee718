"""Does verify --static suspect what the proof finds right? None of it may be.

    python -m benchmarks.static_suspicions             writes benchmarks/results/DATE-static-suspicions.json
    python -m benchmarks.static_suspicions hf          one group, or several; prints, writes nothing
    python -m benchmarks.static_suspicions hf:qwen3    these models of a group

Groups: `hf`, each type of transformers under the plan that it ships, against the newest proofs of
benchmarks/hf_verify.py; `made`, each under the plan that Shardwise makes, against those of made_plans.py;
`mutants`, those of mutants.py, against the newest truth of the plain script in verify_mutants.py. What is
traced is what was proved: small twins, where those were.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from benchmarks import made_plan_results, mutant_results, verify_results
from benchmarks.made_plans import quietly
from benchmarks.results import command_line, now
from benchmarks.static_results import Row, Run, summary
from shardwise.core.errors import ShardwiseError
from shardwise.core.mesh import Mesh, Role
from shardwise.core.plan import TheirPlan
from shardwise.core.verification import Verdict
from shardwise.models.source import find_model
from shardwise.planner.make import Wish, make_plan
from shardwise.report.verify import rows
from shardwise.verify.claim import Claim
from shardwise.verify.run import SETTINGS
from shardwise.verify.without_ranks import check

MESH = Mesh.of({Role.CUTS_TENSORS: 2})
Known = Iterator[tuple[str, str, Claim | None]]
"""Name, the proof's verdict, and the claim."""


def _of_transformers(wanted: frozenset[str]) -> Known:
    for each in verify_results.newest_sweep().run.verifications:
        name = each.model.removeprefix("hf:")
        if not wanted or name in wanted:
            yield name, str(each.verdict), Claim(each.model, str(TheirPlan.HF), name, twin=bool(each.twin))


def _of_made_plans(wanted: frozenset[str]) -> Known:
    for row in made_plan_results.newest_run(MESH.tp).rows:
        if row.runs and (not wanted or row.model_type in wanted):
            yield row.model_type, row.verdict, _made(row.model_type)


def _made(name: str) -> Claim | None:
    """The claim that was proved: its twin under the plan that is made for it."""
    try:
        with quietly():
            twin = find_model(f"hf:{name}").small(MESH.tp)
            return Claim.of(f"hf:{name}", make_plan(twin, Wish(MESH)).plan, twin=True) if twin else None
    except ShardwiseError:
        return None


def _of_mutants(wanted: frozenset[str]) -> Known:
    for row in mutant_results.newest_run().rows:
        if row.mesh == str(MESH) and (not wanted or row.name in wanted):
            verdict = Verdict.WRONG if row.is_harmful else Verdict.RIGHT
            yield (
                row.name,
                str(verdict),
                Claim(f"benchmarks.mutants:{row.name}", str(TheirPlan.OWN), row.name),
            )


GROUPS: dict[str, Callable[[frozenset[str]], Known]] = {
    "mutants": _of_mutants,
    "hf": _of_transformers,
    "made": _of_made_plans,
}


def judged(group: str, wanted: frozenset[str]) -> Iterator[Row]:
    """What the static checks say of each."""
    for name, proved, claim in GROUPS[group](wanted):
        if claim is None or proved == Verdict.SKIPPED:
            continue
        began = time.perf_counter()
        try:
            with quietly():
                (found,) = check([claim], mesh=MESH, settings=SETTINGS)
            static, said = str(found.verdict), rows.headline(found)
        except ShardwiseError as error:  # a plan that is refused before anything is traced
            static, said = str(Verdict.CRASHES), str(error)
        yield Row(group, name, proved, static, said, round(time.perf_counter() - began, 2))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_suspicions", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("names", nargs="*", help="groups, or GROUP:NAME; nothing is written then")
    given = parser.parse_args()
    wanted: dict[str, set[str]] = {} if given.names else {group: set() for group in GROUPS}
    for each in given.names:
        group, _, name = each.partition(":")
        if group not in GROUPS:
            print(f"no group: {group}. There are {', '.join(GROUPS)}.", file=sys.stderr)
            return 2
        wanted.setdefault(group, set()).update([name] if name else [])
    started, began = now(), time.perf_counter()
    found: list[Row] = []
    for group, names in wanted.items():
        for row in judged(group, frozenset(names)):
            found.append(row)
            mark = " <-- suspected, and right" if row.is_defect else ""
            print(f"{group:8} {row.name:36} {row.proved:22} {row.static:22} {row.said}{mark}", flush=True)
    versions = tuple((name, version(name)) for name in ("shardwise", "torch", "transformers"))
    run = Run(
        command_line("benchmarks.static_suspicions"),
        started.isoformat(timespec="seconds"),
        round(time.perf_counter() - began, 1),
        versions,
        tuple(found),
    )
    print(summary(run))
    if not given.names:
        print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
