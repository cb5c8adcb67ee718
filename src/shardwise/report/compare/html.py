"""Comparison -> one HTML file that needs no network: text through jinja2's autoescape, numbers for the charts
as inert JSON, plotly.js inlined.

The page's own content security policy lets it load nothing and run only the two scripts that were put into it
(by their SHA-256), so a name that came from a user's file stays text even where escaping should fail.
Computes nothing but units; what the charts look like is in comparison.js, their colours are in
common/page.css.
"""

import dataclasses
from collections.abc import Sequence

from plotly.offline import get_plotlyjs

from shardwise.core.measurement import Comparison, Measurement, MemoryUse
from shardwise.report.common import units
from shardwise.report.common.page import draw, script_json
from shardwise.report.compare import tables
from shardwise.report.compare.rows import Row, comparison_rows, measured_module
from shardwise.report.compare.tables import HUES
from shardwise.report.diff.html import part_chart

# What fits beside a bar on a phone; the whole name is in the tables and in the hover text.
SHORT_NAME = 20


def comparison_html(comparison: Comparison) -> str:
    """The whole page. About 5 MB, nearly all of it plotly.js."""
    rows = comparison_rows(comparison)
    return draw(
        "compare/comparison.html.j2",
        ("diff/diff.css",),
        (get_plotlyjs(), "compare/comparison.js"),
        comparison=comparison,
        rows=rows,
        tables=tables,
        names=[row.label for row in rows if not row.is_repeat],
        reference=rows[0].label if rows else "",
        interval_of=next((row.ratio for row in rows if row.ratio is not None), None),
        module=measured_module(comparison),
        has_findings=any(row.measurement.agreement and row.measurement.agreement.findings for row in rows),
        stacks=part_chart([(profile.label, profile.parts) for profile in comparison.profiles]),
        data=script_json(_chart_data(comparison, rows)),
    )


def short_name(name: str) -> str:
    """`name` with its middle left out where it is too long for a chart: head and tail tell variants apart."""
    if len(name) <= SHORT_NAME:
        return name
    return f"{name[: SHORT_NAME - 9]}…{name[-8:]}"


def _chart_data(comparison: Comparison, rows: tuple[Row, ...]) -> dict[str, object]:
    """What comparison.js draws, scaled to the charts' units. Numbers that aren't finite arrive there as null:
    a gap in the curve."""
    runs = comparison.measurements
    times = [run.module_times for run in runs if run.module_times is not None]
    module_s = (value for each in times for value in (*each.forward_s, *each.backward_s))
    step = units.unit_for((value for run in runs for value in run.step_s), units.SECOND_UNITS)
    module = units.unit_for(module_s, units.SECOND_UNITS)
    memory = units.unit_for(
        (value for run in runs for value in dataclasses.astuple(run.memory)), units.BYTE_UNITS
    )
    wire = units.unit_for(
        (value for run in runs for value in (run.wire_bytes, run.sent_bytes)), units.BYTE_UNITS
    )
    return {
        "plans": [
            {
                "label": row.label,
                "short": short_name(row.label),
                "color": row.color % HUES,
                "is_repeat": row.is_repeat,
                "step": [value / step.size for value in row.measurement.step_s],
                **_ratio(row),
                **_module_times(row.measurement, module),
                **_memory(row.measurement.memory, memory),
                **_wire(row.measurement, wire),
                "losses": row.measurement.losses,
            }
            for row in rows
        ],
        "noise": (comparison.noise.low, comparison.noise.high) if comparison.noise else None,
        "step_unit": step.name,
        "module_unit": module.name,
        "memory_unit": memory.name,
        "wire_unit": wire.name,
    }


def _ratio(row: Row) -> dict[str, object]:
    if row.is_first:
        return {"ratio": (1.0, 1.0, 1.0), "ratio_text": "1 (reference)"}
    ratio = row.ratio
    shown = (ratio.median, ratio.low, ratio.high) if ratio else None
    return {"ratio": shown, "ratio_text": units.format_interval(ratio)}


def _module_times(run: Measurement, unit: units.Unit) -> dict[str, object]:
    times = run.module_times
    return {
        "forward": [value / unit.size for value in times.forward_s] if times else (),
        "backward": [value / unit.size for value in times.backward_s] if times else (),
    }


def _memory(use: MemoryUse, unit: units.Unit) -> dict[str, object]:
    parts = (
        ("parameters", use.parameter_bytes),
        ("gradients", use.gradient_bytes),
        ("optimizer", use.optimizer_bytes),
    )
    peaks = (
        ("peak active", use.active_bytes),
        ("peak reserved", use.reserved_bytes),
        ("peak resident", use.resident_bytes),
    )
    return {"memory": _marks(parts, unit), "memory_marks": _marks(peaks, unit)}


def _marks(sizes: Sequence[tuple[str, float | None]], unit: units.Unit) -> list[dict[str, object]]:
    """Of what was measured: the value in the chart's unit, and in words."""
    return [
        {"value": value / unit.size, "kind": kind, "part": "", "text": units.format_bytes(value)}
        for kind, value in sizes
        if value is not None
    ]


def _wire(run: Measurement, unit: units.Unit) -> dict[str, object]:
    bars = []
    for use in run.collectives:
        largest = units.format_bytes(use.wire_bytes_largest_rank)
        sent = f"{units.format_bytes(use.wire_bytes)} in {use.count} calls on {use.axis}"
        bars.append(
            {
                "value": use.wire_bytes / unit.size,
                "kind": use.kind.value,
                "part": use.phase,
                "text": f"{sent}; largest rank {largest}",
            }
        )
    return {"wire": bars, "wire_marks": _marks([("sent, measured", run.sent_bytes)], unit)}
