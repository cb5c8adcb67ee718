"""How near predictions are to what compare measures on the machine that was calibrated just before: as data,
its file and its table. No torch."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec

from benchmarks.results import RESULTS, as_json, latest, write_results
from shardwise.core.measurement import Environment

WHAT = "calibrated"
MOST_OFF = 0.15


@dataclass(frozen=True, slots=True)
class Predicted:
    """One plan. step_s, embedding_s: per round, of the slowest rank; the embedding is tok_embeddings alone,
    forward and backward. step_predicted_at_share_s: if ranks had got the share of a core during calibrate
    that they got during compare."""

    plan: str
    step_s: tuple[float, ...]
    embedding_s: tuple[float, ...]
    step_predicted_s: float
    step_predicted_at_share_s: float
    embedding_predicted_s: float
    terms: tuple[tuple[str, float], ...]

    @property
    def step_median_s(self) -> float:
        return _median(self.step_s)

    @property
    def embedding_median_s(self) -> float:
        return _median(self.embedding_s)

    @property
    def error(self) -> float:
        """Signed, of the step: below 0 where it was predicted too fast."""
        return self.step_predicted_s / self.step_median_s - 1

    @property
    def error_at_share(self) -> float:
        return self.step_predicted_at_share_s / self.step_median_s - 1


@dataclass(frozen=True, slots=True)
class Run:
    """calibrate, then compare, then predict. share, compare_share: of a core that a rank got during either;
    load averages: before calibrate, between the two, after compare."""

    environment: Environment
    settings: dict[str, int | float | str]
    load_average: tuple[float, float, float]
    share: float
    compare_share: float | None
    calibrate_s: float
    compare_s: float
    plans: tuple[Predicted, ...]
    constants: tuple[tuple[str, str, str, str], ...]
    what: str = WHAT
    schema_version: int = 1

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of this run; one of the same day is replaced."""
        return write_results(as_json(self), self.environment.started[:10], self.what, folder)


def newest_run(folder: Path = RESULTS) -> Run:
    """Raises FileNotFoundError where there is none."""
    return msgspec.json.decode(latest(WHAT, folder).read_bytes(), type=Run)


def in_order(plans: tuple[Predicted, ...]) -> tuple[int, int, tuple[str, ...]]:
    """Of the pairs of plans whose embeddings differ by more than the noise (each round's is on the same
    side): how many are predicted in that order, how many there are, and the pairs that are not."""
    right, wrong = 0, []
    for one, other in combinations(plans, 2):
        faster = [a < b for a, b in zip(one.embedding_s, other.embedding_s, strict=True)]
        if not (all(faster) or not any(faster)):
            continue
        if (one.embedding_predicted_s < other.embedding_predicted_s) is faster[0]:
            right += 1
        else:
            wrong.append(f"{one.plan} and {other.plan}")
    return right, right + len(wrong), tuple(wrong)


def blocks(run: Run) -> dict[str, str]:
    """Name of a block -> its text."""
    head = [
        "plan",
        "measured ms",
        "range ms",
        "predicted ms",
        "error",
        f"within {MOST_OFF:.0%}",
        "error at compare's share",
        "embedding measured ms",
        "predicted ms",
    ]
    rows = [
        [
            plan.plan,
            f"{plan.step_median_s * 1e3:,.0f}",
            f"{min(plan.step_s) * 1e3:,.0f} to {max(plan.step_s) * 1e3:,.0f}",
            f"{plan.step_predicted_s * 1e3:,.0f}",
            f"{plan.error:+.0%}",
            "met" if abs(plan.error) <= MOST_OFF else "**MISSED**",
            f"{plan.error_at_share:+.0%}",
            f"{plan.embedding_median_s * 1e3:.1f}",
            f"{plan.embedding_predicted_s * 1e3:.1f}",
        ]
        for plan in run.plans
    ]
    rule = ["---", "---:", "---:", "---:", "---:", "---", "---:", "---:", "---:"]
    table = "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))
    right, pairs, wrong = in_order(run.plans)
    not_right = f" (not: {'; '.join(wrong)})" if wrong else ""
    where, (before, between, after) = run.environment, run.load_average
    settings = ", ".join(f"{name} {value}" for name, value in run.settings.items())
    about = (
        f"\nOf {pairs} pairs of plans whose embeddings differ in every round, {right} are predicted in the "
        f"right order{not_right}. {settings}. {where.machine}, {where.cores} cores; torch "
        f"{dict(where.versions)['torch']}. calibrate took {run.calibrate_s:.0f} s, compare "
        f"{run.compare_s:.0f} s; load average {before:.1f}, {between:.1f} and {after:.1f} before, between "
        f"and after; a rank got {run.share:.0%} of a core during calibrate and {_share(run.compare_share)} "
        "during compare: a busy machine is not the same machine a few minutes later. The last error is of "
        "the prediction at the share that compare's ranks got; the verdict is not.\n"
        f"\nSource: `benchmarks/results/{where.started[:10]}-{WHAT}.json`, made by `{where.command}`.\n"
    )
    return {f"benchmark-{WHAT}": table + about}


def _share(share: float | None) -> str:
    return "an unknown part" if share is None else f"{share:.0%}"


def _median(values: tuple[float, ...]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
