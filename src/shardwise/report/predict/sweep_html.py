"""Sweep -> one HTML page: the best as bars, all in a table. Computes nothing but the widths of bars."""

from shardwise.core.prediction import Term
from shardwise.core.sweep import Sweep
from shardwise.report.common.chart import Chart, Key, Part, Stack, chart
from shardwise.report.common.page import draw
from shardwise.report.common.units import Format, format_count, format_seconds
from shardwise.report.predict import rows, sweep_rows, sweep_tables, tables
from shardwise.report.predict.html import SHEETS

# terms below it would be slivers, and their names most of the page
LEAST_SHARE = 0.005


def sweep_html(sweep: Sweep) -> str:
    return draw(
        "predict/sweep.html.j2",
        SHEETS,
        sweep=sweep,
        rows=rows,
        sweep_rows=sweep_rows,
        sweep_tables=sweep_tables,
        tables=tables,
        best=best_chart(sweep),
    )


def best_chart(sweep: Sweep) -> Chart:
    """Of those that fit: a device's time for equally many tokens, by term, all on one scale."""
    points = [point for point in sweep.points if point.fits][: sweep_rows.BARS]
    has_plans = sweep_rows.has_plans(sweep)
    used: list[Term] = []
    stacks = []
    for point in points:
        token_s = 1 / point.tokens_per_s_per_device
        shares = [(term, seconds / point.step_s) for term, seconds in point.terms]
        told = [(term, share) for term, share in shares if share >= LEAST_SHARE]
        used += [term for term, _ in told]
        parts = (
            Part(f"t-{term.name.lower()}", f"{term.value} {100 * share:.1f} %", share * token_s)
            for term, share in told
        )
        label = f"{sweep_rows.label(point, has_plans)}: {format_seconds(point.step_s)}"
        stacks.append(Stack(label, tuple(parts), f"{format_count(point.tokens_per_s_per_device)}/s"))
    keys = [Key(f"t-{term.name.lower()}", term.value) for term in Term if term in used]
    longest = max((1 / point.tokens_per_s_per_device for point in points), default=1.0)
    return chart(stacks, Format(lambda _: ""), keys, scale=longest)
