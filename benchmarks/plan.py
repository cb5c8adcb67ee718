"""How long `shardwise plan` takes, start to finish, and what memory it needs: at a model's real size, and for
60 layers beside 12.

    python -m benchmarks.plan              writes benchmarks/results/DATE-plan-speed.json
    python -m benchmarks.plan --dry        prints, writes nothing

Every command runs as a process of its own, once per round, in rotating order; the clock runs from its start
to its end.
"""

import sys

from benchmarks.explain import GIB, Side, measure
from benchmarks.explain_results import PLAN

SECONDS = 10
RATIO = 1.5


def sides() -> list[Side]:
    """What is timed; the bars are the project's."""
    few, many = (f"--model hf:qwen3?num_hidden_layers={layers} --mesh tp=8" for layers in (12, 60))
    return [
        Side("qwen3", "plan --model hf:qwen3 --mesh tp=8", SECONDS, GIB),
        Side("qwen3, 12 layers", f"plan {few}"),
        Side("qwen3, 60 layers", f"plan {many}", same_as="qwen3, 12 layers", max_ratio=RATIO),
        Side("deepseek_v3, 671 B", "plan --model hf:deepseek_v3 --mesh tp=8"),
    ]


if __name__ == "__main__":
    sys.exit(measure("benchmarks.plan", (__doc__ or "").partition("\n\n")[0], sides(), PLAN, rounds=5))
