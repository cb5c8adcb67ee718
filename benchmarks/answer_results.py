"""Tables of docs/rowwise-or-colwise.md, from the results files of benchmarks/answer.py (predictions) and
benchmarks/answer_measured.py (CPU ranks)."""

from collections.abc import Iterable

from benchmarks.answer import DEGREES, MACHINES, PLACES, STEP_PLANS, AnswerRun, TablePoint, TableRun
from benchmarks.answer import WHAT as PREDICTED
from benchmarks.answer_measured import WHAT as MEASURED
from benchmarks.answer_measured import MeasuredRun
from benchmarks.hf_results import table
from benchmarks.results import newest
from shardwise.core.look_up import TIE

WHATS = (PREDICTED, MEASURED)
SHORT = {"h100-sxm-80gb": "H100", "b200-sxm": "B200", "mi300x": "MI300X"}


def newest_blocks() -> dict[str, str]:
    return measured_blocks(newest(MeasuredRun, MEASURED)) | predicted_blocks(newest(AnswerRun, PREDICTED))


def measured_blocks(run: MeasuredRun) -> dict[str, str]:
    """What each style took on each version, and how that compares."""
    versions = run.versions
    names = [side.name for side in versions[0].sides if "(" not in side.name]
    body = []
    for name in names:
        sides = [next(side for side in version.sides if side.name == name) for version in versions]
        body.append(
            [
                name,
                *(f"{side.median_s * 1e3:.0f} ms" for side in sides),
                f"{sides[0].wire_bytes / 1e6:.1f} MB",
                *(f"{side.gradient_rows:,} x {side.gradient_columns:,}" for side in sides),
            ]
        )
    shown = [f"torch {version.torch}" for version in versions]
    head = ["style", *shown, "sends, by formula", *(f"gradient on a rank, {each}" for each in shown)]
    ratios = [
        [
            f"{slow} over {fast}",
            *(f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})" for found in each),
        ]
        for (slow, fast, _), each in zip(
            versions[0].ratios,
            zip(*([ratio for _, _, ratio in version.ratios] for version in versions), strict=True),
            strict=True,
        )
    ]
    first = versions[0]
    settings = first.settings
    where = first.environment
    about = (
        f"\n{settings['tp']} ranks with one thread each, gloo, float32, {settings['vocab']:,} x "
        f"{settings['hidden']:,}, {settings['tokens']:,} tokens of text; medians of {first.rounds} rounds on "
        f"each, intervals of medians of ratios in one round. {where.machine}, {where.cores} cores. "
        f"{first.checks[0]}\n"
    )
    return {
        "benchmark-answer-measured": table(head, body, numbers=tuple(range(1, len(head))))
        + "\n"
        + table(["time of", *shown], ratios, numbers=(1, 2))
        + about
        + _source(run.day, run.what, run.command)
    }


def predicted_blocks(run: AnswerRun) -> dict[str, str]:
    source = _source(run.day, run.what, run.command)
    return {
        "benchmark-answer-table": _thread(run) + source,
        "benchmark-answer-step": _steps(run) + source,
        "benchmark-answer-memory": _memory(run) + source,
        "benchmark-answer-degrees": _degrees(run) + source,
        "benchmark-answer-sizes": _sizes(run) + source,
        "benchmark-answer-text": _texts(run) + source,
    }


def _source(day: str, what: str, command: str) -> str:
    return f"\nSource: `benchmarks/results/{day}-{what}.json`, made by `{command}`.\n"


def _thread(run: AnswerRun) -> str:
    """The table alone in the thread's own settings: bytes once, times by machine."""
    runs = {each.machine: each for each in run.thread if each.dtype == "float32"}
    first = runs[MACHINES[0]]
    body = []
    for point in first.points:
        beside = [next(p for p in runs[name].points if p.plan == point.plan) for name in MACHINES]
        body.append(
            [
                point.plan,
                _mib(point.sent_bytes),
                _mib(point.held_bytes),
                _mib(point.peak_bytes - point.held_bytes),
                *(f"{_ms(each.step_s - each.host_s)} + {_ms(each.host_s)}" for each in beside),
            ]
        )
    head = [
        "style",
        "a rank sends",
        "holds",
        "and for a moment",
        *(f"ms, {SHORT[name]}" for name in MACHINES),
    ]
    return table(head, body, numbers=tuple(range(1, len(head))))


def _steps(run: AnswerRun) -> str:
    """Each setting on each machine: what PyTorch's rowwise takes, and the others against it."""
    body = []
    for setting in dict.fromkeys(step.setting for step in run.steps):
        for name in MACHINES:
            step_s = {s.plan: s.step_s for s in run.steps if (s.setting, s.machine) == (setting, name)}
            first = step_s[STEP_PLANS[0]]
            against = (f"{100 * (step_s[plan] / first - 1):+.1f} %" for plan in STEP_PLANS[1:])
            body.append([setting, SHORT[name], f"{first * 1e3:,.0f} ms", *against])
    return table(["setting", "machine", *STEP_PLANS], body, numbers=tuple(range(2, 2 + len(STEP_PLANS))))


def _memory(run: AnswerRun) -> str:
    """Active and reserved memory of a rank in each setting: no constant of a machine is in it."""
    body = []
    for setting in dict.fromkeys(step.setting for step in run.steps):
        found = {s.plan: s for s in run.steps if (s.setting, s.machine) == (setting, MACHINES[0])}
        sizes = ((found[plan].active_bytes, found[plan].reserved_bytes) for plan in STEP_PLANS)
        body.append([setting, *(f"{active / 2**30:.1f} / {kept / 2**30:.1f}" for active, kept in sizes)])
    return table(["GiB, active / reserved", *STEP_PLANS], body, numbers=tuple(range(1, 1 + len(STEP_PLANS))))


def _degrees(run: AnswerRun) -> str:
    """The table alone by ranks: each style's time on the first machine, and the fastest of ours on each."""
    first = run.degrees[0]
    plans = tuple(dict.fromkeys(point.plan for point in first.points))
    body = []
    for tp in DEGREES:
        ms = [_ms(next(p.step_s for p in first.points if (p.plan, p.tp) == (plan, tp))) for plan in plans]
        fastest = [_fastest(p for p in each.points if p.tp == tp) for each in run.degrees]
        body.append([f"{tp}{' (across nodes)' if tp > 8 else ''}", *ms, *fastest])
    names = [SHORT[each.machine] for each in run.degrees]
    head = ["tp", *(f"{plan}, ms" for plan in plans), *(f"fastest, {name}" for name in names)]
    return table(head, body, numbers=tuple(range(1, 1 + len(plans))))


def _sizes(run: AnswerRun) -> str:
    body = []
    for each in run.tables:
        tokens = each.points[0].tokens
        cells = []
        for tp in PLACES:
            points = [point for point in each.points if point.tp == tp]
            cells.append(_fastest(points))
        body.append([each.about, f"{each.vocab:,} x {each.hidden:,}", f"{tokens:,}", *cells])
    head = ["as in", "table", "tokens", *(f"tp {tp}{' (2 nodes)' if tp > 8 else ''}" for tp in PLACES)]
    return table(head, body, numbers=(2,))


def _texts(run: AnswerRun) -> str:
    """What the busiest rank sends, over what a colwise rank sends."""
    body = []
    for each in run.texts:
        for plan in ("routed", "routed-interleaved"):
            cells = []
            for tp in dict.fromkeys(point.tp for point in each.points):
                sent = {point.plan: point.sent_bytes for point in each.points if point.tp == tp}
                cells.append(f"{sent[plan] / sent['colwise']:.2f}")
            body.append([_text(each), plan, *cells])
    degrees = dict.fromkeys(point.tp for point in run.texts[0].points)
    return table(["text", "style", *(f"tp {tp}" for tp in degrees)], body, numbers=(2, 3, 4))


def _text(each: TableRun) -> str:
    return each.text.partition(":")[0].partition(",")[0]


def _fastest(points: Iterable[TablePoint]) -> str:
    """Of the native styles, those within TIE of the least, with what rowwise would take over it."""
    found = sorted((each for each in points if "@" not in each.plan), key=lambda point: point.step_s)
    least = found[0].step_s
    best = " or ".join(point.plan for point in found if point.step_s <= least * (1 + TIE))
    rowwise = next(point for point in found if point.plan == "rowwise")
    return f"{best} ({rowwise.step_s / least:.1f} x)" if rowwise.plan not in best.split() else best


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
