"""Does every plan that transformers ships train the model? Proved type by type, on small twins of the default
configurations.

    python -m benchmarks.hf_verify                all types; writes benchmarks/results/DATE-hf-verify.json
    python -m benchmarks.hf_verify --plan hf-ep   the expert-parallel plans; writes DATE-hf-ep-verify.json
    python -m benchmarks.hf_verify qwen3 apertus  these types; prints, writes nothing

Each is what `shardwise verify hf --model hf:TYPE` does. A plan that shards less than 10 % of the parameters
outside embedding and head (of the default configuration) is said to shard nearly nothing. With another
transformers than the one that CI tests the file is called after its version: DATE-hf-verify-5-24.json.
"""

import sys
import time
from importlib.metadata import version

from benchmarks.results import command_line, now
from benchmarks.types import asked, parser, shown
from benchmarks.verify_results import WHATS, Sweep, summary, what_of
from shardwise.core.mesh import Mesh
from shardwise.core.verification import Verification, VerificationRun
from shardwise.verify.claim import NO_PLANS, Claim
from shardwise.verify.run import SETTINGS, verify

MESH = Mesh((("tp", 2),))


def main() -> int:
    asks = parser("hf_verify", __doc__)
    asks.add_argument("--plan", default="hf", choices=tuple(WHATS))
    given = asks.parse_args()
    types, started, began = asked(given.types), now(), time.perf_counter()
    if types is None:
        return 2
    done = 0

    def show(each: Verification) -> None:
        nonlocal done
        done += 1
        print(f"{done:3}/{len(types)} {shown(each)}", flush=True)

    found = verify([Claim(f"hf:{name}", given.plan, given.plan) for name in types], mesh=MESH, on_answer=show)
    with_plan = tuple(
        sorted((each for each in found if each.note not in NO_PLANS.values()), key=lambda each: each.model)
    )
    without = tuple(each.model.removeprefix("hf:") for each in found if each.note in NO_PLANS.values())
    versions = tuple((name, version(name)) for name in ("shardwise", "torch", "transformers"))
    run = VerificationRun(
        str(MESH),
        "cpu",
        SETTINGS.batch,
        SETTINGS.seq,
        started.isoformat(timespec="seconds"),
        versions,
        with_plan,
    )
    what = what_of(given.plan, version("transformers"))
    seconds = round(time.perf_counter() - began, 1)
    sweep = Sweep(command_line("benchmarks.hf_verify"), seconds, run, without, what)
    print(summary(sweep))
    if not given.types:
        print(f"wrote {sweep.write()}; now run python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
