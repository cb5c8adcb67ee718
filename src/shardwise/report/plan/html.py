"""MadePlan and Dims -> an HTML page: a picture of the weights, each class in words, tables, the plan's
file."""

from shardwise.core.dims import Dims
from shardwise.core.made_plan import MadePlan
from shardwise.report.common.page import draw
from shardwise.report.plan import picture, rows, tables


def plan_html(made: MadePlan) -> str:
    return _page(made.dims, made)


def dims_html(dims: Dims) -> str:
    return _page(dims, None)


def _page(dims: Dims, made: MadePlan | None) -> str:
    return draw(
        "plan/plan.html.j2",
        ("plan/plan.css",),
        dims=dims,
        made=made,
        toml=made.to_toml() if made is not None else "",
        rows=rows,
        tables=tables,
        parts=picture.picture(dims),
        cut=[(each, picture.colours(dims)[at]) for at, each in enumerate(dims.classes) if each.is_cut],
        bands=min(dims.ranks, picture.BANDS),
    )
