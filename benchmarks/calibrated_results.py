"""How near predictions are to what compare measures on the machine that was calibrated just before, several
times in a row: as data, its file and its table. No torch."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec

from benchmarks.results import RESULTS, as_json, latest, write_results
from shardwise.core.measurement import Environment

WHAT = "calibrated"
MOST_OFF = 0.12
LEAST_MET = 0.8
"""Of the runs in a row, those that must be within MOST_OFF for every plan: four of five."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """One plan. step_s, embedding_s: per round, of the slowest rank; the embedding is tok_embeddings alone,
    forward and backward. step_predicted_at_share_s: if ranks had got the share of a core during calibrate
    that they got during compare. profiled: of steps that compare recorded after its rounds, by term, what was
    predicted and what was measured (None: a side knows nothing of it), in seconds; the profiler makes steps
    slower."""

    plan: str
    step_s: tuple[float, ...]
    embedding_s: tuple[float, ...]
    step_predicted_s: float
    step_predicted_at_share_s: float
    embedding_predicted_s: float
    terms: tuple[tuple[str, float], ...]
    profiled: tuple[tuple[str, float | None, float | None], ...] = ()

    @property
    def is_met(self) -> bool:
        return abs(self.error) <= MOST_OFF

    @property
    def missed_by(self) -> tuple[str, float] | None:
        """Of a plan that isn't met, the term that is off most the way the step is, in seconds of a profiled
        step."""
        off = [(term, (predicted or 0.0) - (took or 0.0)) for term, predicted, took in self.profiled]
        same_way = [each for each in off if (each[1] > 0) is (self.error > 0)]
        return None if self.is_met else max(same_way, key=lambda each: abs(each[1]), default=None)

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

    @property
    def is_met(self) -> bool:
        return all(plan.is_met for plan in self.plans)


@dataclass(frozen=True, slots=True)
class Runs:
    """One after the other, each calibrated anew."""

    runs: tuple[Run, ...]
    what: str = WHAT
    schema_version: int = 2

    def write(self, folder: Path = RESULTS) -> Path:
        """The file of these runs; one of the same day is replaced."""
        return write_results(as_json(self), self.runs[0].environment.started[:10], self.what, folder)


def newest_run(folder: Path = RESULTS) -> Runs:
    """Raises FileNotFoundError where there is none."""
    return msgspec.json.decode(latest(WHAT, folder).read_bytes(), type=Runs)


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


def blocks(made: Runs) -> dict[str, str]:
    """Name of a block -> its text."""
    several = len(made.runs) > 1
    head = [
        *(["run"] if several else []),
        "plan",
        "measured ms",
        "range ms",
        "predicted ms",
        "error",
        f"within {MOST_OFF:.0%}",
        "the term that missed, in a profiled step",
        "error at compare's share",
        "embedding measured ms",
        "predicted ms",
    ]
    rows = [
        [
            *([str(number)] if several else []),
            plan.plan,
            f"{plan.step_median_s * 1e3:,.0f}",
            f"{min(plan.step_s) * 1e3:,.0f} to {max(plan.step_s) * 1e3:,.0f}",
            f"{plan.step_predicted_s * 1e3:,.0f}",
            f"{plan.error:+.0%}",
            "met" if plan.is_met else "**MISSED**",
            _missed(plan),
            f"{plan.error_at_share:+.0%}",
            f"{plan.embedding_median_s * 1e3:.1f}",
            f"{plan.embedding_predicted_s * 1e3:.1f}",
        ]
        for number, run in enumerate(made.runs, 1)
        for plan in run.plans
    ]
    left = {"run", "plan", f"within {MOST_OFF:.0%}", "the term that missed, in a profiled step"}
    rule = ["---" if name in left else "---:" for name in head]
    table = "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))
    met = sum(run.is_met for run in made.runs)
    is_met = met >= LEAST_MET * len(made.runs)
    enough = "" if several else " One run says nothing of how many in a row meet it."
    bar = (
        f"\nThe bar, every plan within {MOST_OFF:.0%} in at least {LEAST_MET:.0%} of the runs in a row: "
        f"{met} of {len(made.runs)}, {'met' if is_met else '**MISSED**'}.{enough}\n"
    )
    about = "".join(_about(number, run) for number, run in enumerate(made.runs, 1))
    where = made.runs[0].environment
    source = f"\nSource: `benchmarks/results/{where.started[:10]}-{WHAT}.json`, made by `{where.command}`.\n"
    return {
        f"benchmark-{WHAT}": table + bar + about + source,
        f"benchmark-{WHAT}-terms": _terms_table(made) + source,
    }


def _missed(plan: Predicted) -> str:
    missed = plan.missed_by
    return "" if missed is None else f"{missed[0]} {missed[1] * 1e3:+,.0f} ms"


def _about(number: int, run: Run) -> str:
    right, pairs, wrong = in_order(run.plans)
    not_right = f" (not: {'; '.join(wrong)})" if wrong else ""
    where, (before, between, after) = run.environment, run.load_average
    settings = ", ".join(f"{name} {value}" for name, value in run.settings.items())
    return (
        f"\nRun {number}: of {pairs} pairs of plans whose embeddings differ in every round, {right} are "
        f"predicted in the right order{not_right}. {settings}. {where.machine}, {where.cores} cores; torch "
        f"{dict(where.versions)['torch']}. calibrate took {run.calibrate_s:.0f} s, compare "
        f"{run.compare_s:.0f} s; load average {before:.1f}, {between:.1f} and {after:.1f} before, between "
        f"and after; a rank got {run.share:.0%} of a core during calibrate and {_share(run.compare_share)} "
        "during compare.\n"
    )


def _terms_table(made: Runs) -> str:
    """Of every run and plan what terms were predicted at and took, in steps under the profiler."""
    names = list(dict.fromkeys(term for run in made.runs for plan in run.plans for term, *_ in plan.profiled))
    head = ["run", "plan", *names]
    rows = []
    for number, run in enumerate(made.runs, 1):
        for plan in run.plans:
            known = {term: (predicted, took) for term, predicted, took in plan.profiled}
            cells = [_both(*known.get(name, (None, None))) for name in names]
            rows.append([str(number), plan.plan, *cells])
    rule = ["---", "---", *("---:" for _ in names)]
    table = "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))
    return f"Predicted / measured, ms of a step under the profiler.\n\n{table}"


def _both(predicted_s: float | None, took_s: float | None) -> str:
    sides = ("–" if each is None else f"{each * 1e3:,.0f}" for each in (predicted_s, took_s))
    return " / ".join(sides)


def _share(share: float | None) -> str:
    return "an unknown part" if share is None else f"{share:.0%}"


def _median(values: tuple[float, ...]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
