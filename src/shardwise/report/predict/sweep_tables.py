"""Sweep -> tables and words: the best ways to use the devices, what was left out and why."""

from shardwise.core.sweep import Sweep, SweepPoint
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.table import Block, Cell, Column, Line, Report, Row, Table, Tone, Words, row
from shardwise.report.common.units import BYTES, COUNT, NUMBER, SECONDS
from shardwise.report.predict import sweep_rows as rows
from shardwise.report.predict.tables import assumed_words, constants_table


def sweep_report(sweep: Sweep) -> Report:
    about = (
        Line(f"on {name(sweep.machine.name)}", lead=name(sweep.model)),
        Line(rows.setting_text(sweep)),
        Line(rows.headline(sweep), Tone.STRONG),
    )
    blocks: list[Block] = [Words(about)]
    if sweep.points:
        blocks.append(points_table(sweep))
    if sweep.refused:
        blocks.append(_left_out(sweep))
    blocks.append(assumed_words(rows.assumptions(sweep), sweep.machine, rows.traced_text(sweep)))
    title = f"Ways to use {sweep.devices:,} devices: {name(sweep.model)}"
    return Report(title, tuple(blocks), (constants_table(sweep.machine),))


def points_table(sweep: Sweep) -> Table:
    has_plans = rows.has_plans(sweep)
    columns = (
        *((Column("Plan", wraps=True),) if has_plans else ()),
        Column("Mesh"),
        Column("Micro-batch", NUMBER),
        Column("Step", SECONDS),
        Column("Tokens/s per device", COUNT),
        Column("Memory of a device", BYTES),
        Column("Fits"),
        Column("Most time lost", wraps=True),
    )
    note = Line(
        "Micro-batch: sequences of a data-parallel rank at a time x times a step. --top shows more rows; "
        "--json and --out have all.",
        Tone.QUIET,
    )
    body = tuple(_point(point, has_plans) for point in sweep.points)
    return Table("sweep", "", columns, body, (note,), sorts=True, short=20, long=rows.PAGE_ROWS)


def _point(point: SweepPoint, has_plans: bool) -> Row:
    plan = (name(point.plan, "(no plan)"),) if has_plans else ()
    return row(
        *plan,
        Cell(rows.mesh_text(point), tone=Tone.PLAIN if point.fits else Tone.QUIET),
        Cell(point.micro_batch, rows.micro_text(point)),
        point.step_s,
        point.tokens_per_s_per_device,
        point.memory.device_bytes,
        Cell("yes", tone=Tone.GOOD) if point.fits else Cell("no", tone=Tone.BAD),
        rows.lost_text(point),
    )


def _left_out(sweep: Sweep) -> Words:
    shown = sweep.refused[: rows.REFUSALS]
    lines = [
        Line(f"{each.points:,} left out under {name(each.plan)}: {sentence(each.reason)}", Tone.CAUTION)
        for each in shown
    ]
    if len(sweep.refused) > len(shown):
        more = len(sweep.refused) - len(shown)
        lines.append(Line(f"{more} reasons more are in the JSON and on the page.", Tone.CAUTION))
    return Words(tuple(lines))
