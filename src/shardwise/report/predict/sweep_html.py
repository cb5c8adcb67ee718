"""Sweep -> one HTML file that needs no network; the rules of report/page.py hold. Computes nothing but the widths of bars."""

from shardwise.core.prediction import Term
from shardwise.core.sweep import Sweep
from shardwise.report.common.units import format_count, format_seconds
from shardwise.report.explain.html import Bar, Chart, Key, Segment
from shardwise.report.predict import sweep_rows
from shardwise.report.predict.html import page_parts, percent, predict_environment

# terms below it would be slivers, and their names most of the page
LEAST_SHARE = 0.005


def sweep_html(sweep: Sweep) -> str:
    """The whole page: the best as bars, all in a table."""
    environment = predict_environment()
    environment.globals.update(sweep_rows=sweep_rows)
    return environment.get_template("predict/sweep.html.j2").render(
        sweep=sweep, best=best_chart(sweep), has_plans=sweep_rows.has_plans(sweep), **page_parts(environment)
    )


def best_chart(sweep: Sweep) -> Chart:
    """Of those that fit: a device's time for a thousand tokens, by term, all on one scale."""
    points = [point for point in sweep.points if point.fits][: sweep_rows.BARS]
    has_plans = sweep_rows.has_plans(sweep)
    longest = max((1 / point.tokens_per_s_per_device for point in points), default=1.0)
    used: list[Term] = [
        term
        for term in Term
        if any(dict(point.terms).get(term, 0.0) >= LEAST_SHARE * point.step_s for point in points)
    ]
    bars = []
    for point in points:
        per_token_s = 1 / point.tokens_per_s_per_device / point.step_s
        found = [(term, seconds) for term, seconds in point.terms if seconds >= LEAST_SHARE * point.step_s]
        segments = tuple(
            Segment(
                f"t-{term.name.lower()}",
                term.value,
                f"{100 * seconds / point.step_s:.1f} %",
                percent(seconds * per_token_s, longest),
            )
            for term, seconds in found
        )
        total = f"{format_count(point.tokens_per_s_per_device)}/s"
        bars.append(
            Bar(f"{sweep_rows.label(point, has_plans)}: {format_seconds(point.step_s)}", segments, total)
        )
    return Chart(tuple(bars), tuple(Key(f"t-{term.name.lower()}", term.value) for term in used))
