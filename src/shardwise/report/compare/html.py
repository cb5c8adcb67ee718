"""Comparison -> one HTML file that needs no network: text through jinja2's autoescape, numbers for the charts as inert JSON, plotly.js inlined.

The page's own content security policy lets it load nothing and run only the two scripts that were put into it (by their SHA-256), so
a name that came from a user's file stays text even where escaping should fail. Computes nothing but units; what the charts look like
is in comparison.js, their colours are in common/page.css.
"""

import dataclasses
from dataclasses import dataclass

from plotly.offline import get_plotlyjs

from shardwise.core.measurement import Comparison
from shardwise.report.common import units
from shardwise.report.common.page import draw, script_json
from shardwise.report.compare import tables
from shardwise.report.compare.rows import Row, comparison_rows, measured_module
from shardwise.report.compare.tables import HUES
from shardwise.report.diff.html import part_chart

# What fits beside a bar on a phone; the whole name is in the tables and in the hover text.
SHORT_NAME = 20


@dataclass(frozen=True, slots=True)
class ChartBar:
    """One segment of a stacked bar: `value` in the chart's unit, `text` for people."""

    value: float
    kind: str
    part: str
    text: str


@dataclass(frozen=True, slots=True)
class ChartMark:
    """A measured number beside a bar."""

    value: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class ChartPlan:
    """One plan's numbers for every chart, scaled to the charts' units."""

    label: str
    short: str
    color: int
    is_repeat: bool
    step: tuple[float, ...]
    ratio: tuple[float, float, float] | None
    ratio_text: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    memory: tuple[ChartBar, ...]
    memory_marks: tuple[ChartMark, ...]
    wire: tuple[ChartBar, ...]
    wire_marks: tuple[ChartMark, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChartData:
    """What comparison.js draws. Numbers that aren't finite arrive there as null: a gap in the curve."""

    plans: tuple[ChartPlan, ...]
    noise: tuple[float, float] | None
    step_unit: str
    module_unit: str
    memory_unit: str
    wire_unit: str


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


def _chart_data(comparison: Comparison, rows: tuple[Row, ...]) -> ChartData:
    runs = comparison.measurements
    times = [run.module_times for run in runs if run.module_times is not None]
    step_unit = units.unit_for((value for run in runs for value in run.step_s), units.SECOND_UNITS)
    module_unit = units.unit_for(
        (value for found in times for value in (*found.forward_s, *found.backward_s)), units.SECOND_UNITS
    )
    memory_unit = units.unit_for(
        (value for run in runs for value in dataclasses.astuple(run.memory)), units.BYTE_UNITS
    )
    wire_unit = units.unit_for(
        (value for run in runs for value in (run.wire_bytes, run.sent_bytes)), units.BYTE_UNITS
    )
    return ChartData(
        plans=tuple(_chart_plan(row, step_unit, module_unit, memory_unit, wire_unit) for row in rows),
        noise=(comparison.noise.low, comparison.noise.high) if comparison.noise else None,
        step_unit=step_unit.name,
        module_unit=module_unit.name,
        memory_unit=memory_unit.name,
        wire_unit=wire_unit.name,
    )


def _chart_plan(
    row: Row, step_unit: units.Unit, module_unit: units.Unit, memory_unit: units.Unit, wire_unit: units.Unit
) -> ChartPlan:
    run = row.measurement
    times = run.module_times
    parts = (
        ("parameters", run.memory.parameter_bytes),
        ("gradients", run.memory.gradient_bytes),
        ("optimizer", run.memory.optimizer_bytes),
    )
    peaks = (
        ("peak active", run.memory.active_bytes),
        ("peak reserved", run.memory.reserved_bytes),
        ("peak resident", run.memory.resident_bytes),
    )
    return ChartPlan(
        label=run.label,
        short=short_name(run.label),
        color=row.color % HUES,
        is_repeat=row.is_repeat,
        step=_scaled(run.step_s, step_unit),
        ratio=(1.0, 1.0, 1.0)
        if row.is_first
        else (row.ratio.median, row.ratio.low, row.ratio.high)
        if row.ratio
        else None,
        ratio_text="1 (reference)" if row.is_first else units.format_interval(row.ratio),
        forward=_scaled(times.forward_s, module_unit) if times else (),
        backward=_scaled(times.backward_s, module_unit) if times else (),
        memory=tuple(
            ChartBar(value / memory_unit.size, kind, "", units.format_bytes(value)) for kind, value in parts
        ),
        memory_marks=tuple(
            ChartMark(value / memory_unit.size, kind, units.format_bytes(value))
            for kind, value in peaks
            if value is not None
        ),
        wire=tuple(
            ChartBar(
                use.wire_bytes / wire_unit.size,
                use.kind.value,
                use.phase,
                f"{units.format_bytes(use.wire_bytes)} in {use.count} calls on {use.axis}; "
                f"largest rank {units.format_bytes(use.wire_bytes_largest_rank)}",
            )
            for use in run.collectives
        ),
        wire_marks=(
            ()
            if run.sent_bytes is None
            else (
                ChartMark(
                    run.sent_bytes / wire_unit.size, "sent, measured", units.format_bytes(run.sent_bytes)
                ),
            )
        ),
        losses=run.losses,
    )


def _scaled(values: tuple[float, ...], unit: units.Unit) -> tuple[float, ...]:
    return tuple(value / unit.size for value in values)
