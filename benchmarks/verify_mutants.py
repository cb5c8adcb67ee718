"""Does verify catch every harmful mutant, no harmless one, and for the right reason?

    python -m benchmarks.verify_mutants          writes benchmarks/results/DATE-verify-mutants.json
    python -m benchmarks.verify_mutants NAME...  these mutants; prints, writes nothing

benchmarks/mutants.py has the mutants and what was expected of each, benchmarks/mutant_oracle.py decides which
are harmful. A reason is right where the cause of a finding that doesn't only follow from others is the
expected one; of a crash, where verify says crash.
"""

import argparse
import sys
import time
from importlib.metadata import version

import msgspec

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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verify_mutants", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", help="these mutants only; nothing is written then")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in MUTANTS]
    if unknown:
        print(f"no mutants: {', '.join(unknown)}", file=sys.stderr)
        return 2
    names, started, began = given.names or list(MUTANTS), now(), time.perf_counter()
    harm = {truth.name: truth for truth in truths(names)}
    found: list[Row] = []

    def show(each: Verification) -> None:
        mutant, truth = MUTANTS[each.plan], harm[each.plan]
        row = Row(
            mutant.name,
            mutant.about,
            mutant.expected,
            truth.is_harmful,
            str(each.verdict),
            reasons(each),
            rows.headline(each),
        )
        found.append(row)
        mark = (
            ""
            if row.is_judged_right and row.is_reason_right
            else " <-- " + ("reason" if row.is_judged_right else "WRONG")
        )
        print(
            f"{len(found):3}/{len(names)} {mutant.name:42} {mutant.expected:18} {each.verdict:8} "
            f"{', '.join(row.reasons)}{mark}",
            flush=True,
        )

    verify([Claim(f"benchmarks.mutants:{name}", "own", name) for name in names], mesh=MESH, on_answer=show)
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
