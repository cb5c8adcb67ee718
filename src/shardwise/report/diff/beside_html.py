"""A predicted step beside a measured one -> one HTML file that needs no network. Computes widths only."""

from collections.abc import Sequence

from shardwise.core.beside import FURTHER, IDLE, Beside
from shardwise.core.difference import StepPicture
from shardwise.core.parts import PARTS, parts_of
from shardwise.core.prediction import Term
from shardwise.report.common.chart import Chart, Part, Stack, chart
from shardwise.report.common.page import draw
from shardwise.report.diff import beside_tables, rows, tables
from shardwise.report.diff.html import drawings_of, part_chart

_STYLES = {term.value: f"t-{term.name.lower()}" for term in Term} | {
    IDLE: "p-other_idle",
    FURTHER: "p-exposed_communication",
}


def beside_html(both: Beside, pictures: Sequence[StepPicture] = ()) -> str:
    """pictures: of the predicted step, then of the measured one."""
    parts = [("predicted", both.predicted.parts), ("measured", both.measured.parts)]
    return draw(
        "diff/beside.html.j2",
        ("explain/explain.css", "predict/predict.css", "diff/diff.css"),
        both=both,
        rows=rows,
        tables=tables,
        beside=beside_tables,
        terms=term_chart(both),
        stacks=part_chart(parts),
        drawings=drawings_of(pictures),
        parts=parts_of(each for _, each in parts),
        all_parts=PARTS,
    )


def term_chart(both: Beside) -> Chart:
    """Two bars on one scale: what a term is in one is above what it is in the other."""
    sides = (("predicted", "predicted_ns"), ("measured", "measured_ns"))
    stacks = [
        Stack(
            label,
            tuple(
                Part(_STYLES.get(each.term, "p-idle"), each.term, getattr(each, side))
                for each in both.terms
                if (getattr(each, side) or 0.0) > 0
            ),
        )
        for label, side in sides
    ]
    return chart(stacks, tables.NS, shares=True)
