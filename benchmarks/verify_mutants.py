"""Does verify catch every harmful mutant, no harmless one, and for the right reason?

    python -m benchmarks.verify_mutants           writes benchmarks/results/DATE-verify-mutants.json
    python -m benchmarks.verify_mutants BEGIN...  mutants whose names begin so; prints, writes nothing

benchmarks/mutants.py has the mutants of plans, on tp alone, and axis_mutants.py those of steps on every mesh,
each with what was expected; mutant_oracle.py and axis_oracle.py decide which are harmful. A reason is right
where the cause of a finding that doesn't only follow from others is the expected one, and names the axis or
the module that it should; of a crash, where verify says crash.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import msgspec

from benchmarks import axis_ranks
from benchmarks.axis_mutants import MUTANTS as AXIS_MUTANTS
from benchmarks.mutant_oracle import Truth
from benchmarks.mutant_results import Row, Run, summary
from benchmarks.mutants import CRASHES, MUTANTS
from benchmarks.results import command_line, now
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verdict, Verification
from shardwise.launch import run_ranks
from shardwise.report.verify import rows
from shardwise.verify.claim import Claim
from shardwise.verify.run import verify

MESH = Mesh((("tp", 2),))


def truths(names: list[str]) -> list[Truth]:
    """What the plain script says."""
    results = run_ranks(
        "benchmarks.mutant_oracle:run",
        msgspec.json.encode(names),
        world_size=2,
        device_type="cpu",
        timeout_s=90,
    )
    return msgspec.json.decode(results[0], type=list[Truth])


def reasons(found: Verification) -> tuple[str, ...]:
    """The causes that verify names itself."""
    causes = [
        str(finding.cause)
        for finding in found.wrong
        if finding.cause is not None and finding.cause not in rows.PASSED_ON
    ]
    return tuple(dict.fromkeys(causes + [CRASHES] * (found.verdict is Verdict.CRASHES)))


def of_plans(names: Sequence[str], show: Callable[[Row], None]) -> None:
    """Those of mutants.py."""
    harm = {truth.name: truth for truth in truths(list(names))}

    def judge(each: Verification) -> None:
        mutant = MUTANTS[each.plan]
        show(
            Row(
                mutant.name, mutant.about, mutant.expected, harm[each.plan].is_harmful, str(each.verdict),
                reasons(each), rows.headline(each),
            )
        )  # fmt: skip

    claims = [Claim(f"benchmarks.mutants:{name}", "own", name) for name in names]
    verify(claims, mesh=MESH, on_answer=judge)


def of_steps(names: Sequence[str], show: Callable[[Row], None]) -> None:
    """Those of axis_mutants.py."""

    def judge(each: axis_ranks.Judged) -> None:
        mutant, found = AXIS_MUTANTS[each.truth.name], each.found
        show(
            Row(
                mutant.name, mutant.about, mutant.expected, each.truth.is_harmful, str(found.verdict),
                axis_ranks.reasons(found), rows.headline(found), mutant.mesh,
                axis_ranks.is_said(mutant.where, found),
            )
        )  # fmt: skip

    axis_ranks.judged(names, judge)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verify_mutants", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("names", nargs="*", help="mutants whose names begin so; nothing is written then")
    given = parser.parse_args()
    every = [*MUTANTS, *AXIS_MUTANTS]
    names = [name for name in every if not given.names or name.startswith(tuple(given.names))]
    if not names:
        print(f"no mutants: {', '.join(given.names)}", file=sys.stderr)
        return 2
    started, began = now(), time.perf_counter()
    found: list[Row] = []

    def show(row: Row) -> None:
        found.append(row)
        mark = "" if row.is_judged_right and row.is_reason_right else " <-- "
        mark += "" if not mark else "reason" if row.is_judged_right else "WRONG"
        print(
            f"{len(found):3}/{len(names)} {row.name:60} {row.expected:18} {row.verdict:8} "
            f"{', '.join(row.reasons)}{mark}",
            flush=True,
        )

    for judge, known in ((of_plans, MUTANTS), (of_steps, AXIS_MUTANTS)):
        own = [name for name in names if name in known]
        if own:
            judge(own, show)
    versions = tuple((name, version(name)) for name in ("shardwise", "torch"))
    seconds = round(time.perf_counter() - began, 1)
    run = Run(
        command_line("benchmarks.verify_mutants"),
        started.isoformat(timespec="seconds"),
        seconds,
        versions,
        tuple(found),
    )
    print(summary(run))
    if not given.names:
        print(f"wrote {run.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
