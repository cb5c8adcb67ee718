"""Search -> one HTML page: the answer, the picture, each plan with its file, tables. Computes nothing but the
widths of bars and the places of dots."""

from collections.abc import Sequence

from shardwise.core.search import Found, Search
from shardwise.report.common.chart import Chart, Part, Stack, chart
from shardwise.report.common.page import draw
from shardwise.report.common.units import SECONDS, format_seconds
from shardwise.report.predict import rows as predicted_rows
from shardwise.report.predict import tables as predicted_tables
from shardwise.report.search import commands, rows, tables
from shardwise.report.search.picture import pictures

SHEETS = ("predict/predict.css", "search/search.css")
SCRIPTS = ("common/page.js", "search/search.js")
# terms below it would be slivers, and their names most of the page
LEAST_SHARE = 0.005


def search_html(search: Search) -> str:
    return draw(
        "search/search.html.j2",
        SHEETS,
        SCRIPTS,
        search=search,
        rows=predicted_rows,
        tables=predicted_tables,
        search_rows=rows,
        search_tables=tables,
        commands=commands,
        pictures=pictures(search),
        terms=terms_chart(search.found),
    )


def terms_chart(found: Sequence[Found]) -> Chart:
    """A bar per plan, all on one scale: a shorter step is shorter."""
    stacks = []
    for index, each in enumerate(found, 1):
        parts = tuple(
            Part(f"t-{term.name.lower()}", term.value, seconds)
            for term, seconds in each.terms
            if seconds > LEAST_SHARE * each.step_s
        )
        label = f"{index}. {each.candidate.short_mesh}"
        stacks.append(Stack(label, parts, format_seconds(each.step_s)))
    return chart(stacks, SECONDS, scale=max((each.step_s for each in found), default=1.0))
