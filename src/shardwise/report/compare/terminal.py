"""Comparison -> rich renderables for a terminal of a given width, with or without colour. Computes nothing.

Names come from the user's files: they are shown as text, never read as markup, and control characters in them are made visible.
"""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shardwise.core.measurement import Comparison, Measurement
from shardwise.report.common.plain import plain
from shardwise.report.common.units import (
    format_bytes,
    format_confidence,
    format_count,
    format_error,
    format_interval,
    format_number,
    format_seconds,
)
from shardwise.report.compare.rows import Row, comparison_rows, measured_module, not_measured
from shardwise.report.diff.rows import part_ns, parts_of, time

# A cell has no room for "not measured"; the line below the tables says what the dash means.
ABSENT = "–"

# From this width on, times, memory and bytes of a plan stand in one row; below, in two tables.
ONE_TABLE_COLUMNS = 150
PAYLOAD_COLUMNS = 96


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the comparison for the console's width."""
    for renderable in comparison_tables(comparison, console.width):
        console.print(renderable)


def comparison_tables(comparison: Comparison, width: int) -> list[RenderableType]:
    """Headline, a row per plan, collectives, findings, verdict and notes, laid out for `width` columns."""
    rows = comparison_rows(comparison)
    parts: list[RenderableType] = [_headline(comparison)]
    if width >= ONE_TABLE_COLUMNS:
        agreement = ("agreement",) if _has_agreement(rows) else ()
        parts.append(
            _plan_table(
                "Per plan",
                comparison,
                rows,
                (*_time_columns(comparison), *_size_columns(comparison), *agreement),
            )
        )
    else:
        parts.append(_plan_table("Time", comparison, rows, _time_columns(comparison)))
        parts.append(
            _plan_table(
                "Memory of one rank, and the bytes it sends in a step",
                comparison,
                rows,
                _size_columns(comparison),
            )
        )
        if _has_agreement(rows):
            parts.append(_agreement_table(rows))
    parts.append(_legend(comparison, rows))
    if any(row.measurement.collectives for row in rows):
        parts.append(_collective_table(rows, width))
    if comparison.profiles:
        parts.append(_profile_table(comparison))
    findings = _findings(rows)
    if findings:
        parts.append(findings)
    parts.append(_verdict(comparison))
    if comparison.notes:
        parts.append(Padding(Group(*(_bullet(note, "") for note in comparison.notes)), (0, 1)))
    return parts


def _headline(comparison: Comparison) -> RenderableType:
    settings = comparison.settings
    environment = comparison.environment
    first = Text.assemble(
        (plain(comparison.model), "bold"),
        f" ({format_count(comparison.parameters)} parameters) on ",
        (plain(comparison.mesh), "bold"),
        f" · {_ranks(environment.world_size)}, {plain(environment.backend)}, {plain(environment.device)} · {plain(environment.machine)}",
    )
    second = f"batch {settings.batch} x sequence {settings.seq} = {settings.tokens} tokens a step · {plain(settings.precision)}"
    if settings.accumulation > 1:
        second += f" · {settings.accumulation} micro-batches"
    if settings.recompute != "none":
        second += f" · recompute {plain(settings.recompute)}"
    if settings.compiled:
        second += " · compiled"
    second += f" · {comparison.rounds} rounds"
    lines = [first, Text(second)]
    if comparison.module is not None:
        lines.append(
            Text.assemble(
                "measured: ",
                (plain(comparison.module), "bold"),
                " alone, forward + backward; a step is one of both",
            )
        )
    return Padding(Group(*lines), (0, 1, 1, 1))


def _time_columns(comparison: Comparison) -> tuple[str, ...]:
    columns = ["step", "ratio"]
    if comparison.module is None:
        columns.append("tokens")
    if any(
        row.module_forward_s is not None or row.module_backward_s is not None
        for row in comparison_rows(comparison)
    ):
        columns += ["forward", "backward"]
    return tuple(columns)


def _size_columns(comparison: Comparison) -> tuple[str, ...]:
    memories = [run.memory for run in comparison.measurements]
    columns = ["parameters", "gradients", "optimizer"]
    if any(memory.active_bytes is not None for memory in memories):
        columns.append("active")
    if any(memory.reserved_bytes is not None for memory in memories):
        columns.append("reserved")
    if any(memory.resident_bytes is not None for memory in memories):
        columns.append("resident")
    columns.append("wire")
    if any(run.sent_bytes is not None for run in comparison.measurements):
        columns.append("sent")
    return tuple(columns)


def _header(column: str, comparison: Comparison) -> str:
    first = comparison.measurements[0].label if comparison.measurements else "first"
    first = plain(first) if len(first) <= 12 else "the first"
    return {
        "step": "step\nmedian" if comparison.module is None else "fwd+bwd\nmedian",
        "ratio": f"time over {first}\n[interval]",
        "tokens": "tokens\nper s",
        "forward": "module\nforward",
        "backward": "module\nbackward",
        "agreement": "gradient\nerror",
        "parameters": "para-\nmeters",
        "gradients": "gra-\ndients",
        "optimizer": "opti-\nmizer",
        "active": "peak\nactive",
        "reserved": "peak re-\nserved",
        "resident": "peak re-\nsident",
        "wire": "wire,\nformula",
        "sent": "sent,\nmeasured",
    }[column]


def _cell(column: str, row: Row) -> Text:
    memory = row.measurement.memory
    match column:
        case "step":
            return Text(format_seconds(row.step_s, ABSENT), "bold")
        case "ratio":
            return Text("1 (reference)") if row.is_first else Text(format_interval(row.ratio, ABSENT))
        case "tokens":
            return Text(format_count(row.tokens_per_s, ABSENT))
        case "forward":
            return Text(format_seconds(row.module_forward_s, ABSENT))
        case "backward":
            return Text(format_seconds(row.module_backward_s, ABSENT))
        case "agreement":
            return _agreement(row.measurement)
        case "parameters":
            return Text(format_bytes(memory.parameter_bytes))
        case "gradients":
            return Text(format_bytes(memory.gradient_bytes))
        case "optimizer":
            return Text(format_bytes(memory.optimizer_bytes))
        case "active":
            return Text(format_bytes(memory.active_bytes, ABSENT))
        case "reserved":
            return Text(format_bytes(memory.reserved_bytes, ABSENT))
        case "resident":
            return Text(format_bytes(memory.resident_bytes, ABSENT))
        case "wire":
            return Text(format_bytes(row.measurement.wire_bytes))
        case "sent":
            return Text(format_bytes(row.measurement.sent_bytes, ABSENT))
        case _:
            raise AssertionError(f"no such column: {column}")


def _plan_table(title: str, comparison: Comparison, rows: tuple[Row, ...], columns: tuple[str, ...]) -> Table:
    table = _table(title)
    table.add_column("plan", overflow="fold", min_width=10, max_width=36)
    for column in columns:
        table.add_column(_header(column, comparison), justify="right", no_wrap=True)
    for row in rows:
        name = Text(plain(row.label), "bold" if not row.is_repeat else "")
        if row.is_repeat:
            name.append("\nnoise (A/A)", "italic")
        table.add_row(name, *(_cell(column, row) for column in columns), style="dim" if row.is_repeat else "")
    return table


def _legend(comparison: Comparison, rows: tuple[Row, ...]) -> RenderableType:
    lines = []
    ratio = next((row.ratio for row in rows if row.ratio is not None), None)
    if ratio is not None:
        lines.append(
            f"interval: {format_confidence(ratio.confidence)}, from {ratio.pairs} pairs of rounds; an interval that holds 1 shows no difference."
        )
    if any(row.is_repeat for row in rows):
        lines.append(
            "noise (A/A): the first plan once more. A difference as small as its own means nothing here."
        )
    module = measured_module(comparison)
    if module is not None:
        lines.append(f"module: {plain(module)}, timed alone.")
    lines.append(
        "wire: what one rank sends in a step by the ring and pairwise formulas, mean over the ranks."
    )
    absent = not_measured(comparison)
    if absent:
        lines.append(f"Not measured in this run: {'; '.join(absent)}.")
    return Padding(Text("\n".join(lines), "dim"), (0, 1, 1, 1))


def _collective_table(rows: tuple[Row, ...], width: int) -> Table:
    table = _table("Collectives of one rank in a step")
    table.add_column("plan", overflow="fold", min_width=10, max_width=24)
    table.add_column("collective", no_wrap=True)
    table.add_column("axis", no_wrap=True)
    table.add_column("phase", overflow="fold")
    table.add_column("calls", justify="right", no_wrap=True)
    if width >= PAYLOAD_COLUMNS:
        table.add_column("payload\nbytes", justify="right", no_wrap=True)
    table.add_column("wire bytes\nmean", justify="right", no_wrap=True)
    table.add_column("wire bytes\nlargest rank", justify="right", no_wrap=True)
    for row in rows:
        if row.is_repeat:
            continue
        for index, use in enumerate(row.measurement.collectives):
            cells = [
                Text(plain(row.label) if index == 0 else "", "bold"),
                Text(use.kind.value),
                Text(plain(use.axis)),
                Text(plain(use.phase)),
                Text(str(use.count)),
            ]
            if width >= PAYLOAD_COLUMNS:
                cells.append(Text(format_bytes(use.payload_bytes)))
            cells += [Text(format_bytes(use.wire_bytes)), Text(format_bytes(use.wire_bytes_largest_rank))]
            table.add_row(*cells, end_section=index == len(row.measurement.collectives) - 1)
        if not row.measurement.collectives:
            table.add_row(Text(plain(row.label), "bold"), Text("none"), end_section=True)
    return table


def _profile_table(comparison: Comparison) -> RenderableType:
    """Where a step's time goes, by the profiles."""
    profiles = comparison.profiles
    found = parts_of([profile.parts for profile in profiles])
    table = _table("Where a step's time goes, by its profiles (mean of all ranks)")
    table.add_column("Part", overflow="fold")
    for profile in profiles:
        table.add_column(plain(profile.label), justify="right", overflow="fold")
    for key, label in found:
        shares = [part_ns(profile.parts, key) for profile in profiles]
        table.add_row(
            label,
            *(
                f"{time(ns)}\n{100 * ns / profile.parts.total_ns:.1f} %"
                for ns, profile in zip(shares, profiles, strict=True)
            ),
        )
    table.add_row("step", *(time(profile.parts.total_ns) for profile in profiles), style="bold")
    words = [
        _bullet(f"{plain(profile.label)}: {plain(line)}", "")
        for profile in profiles
        for line in profile.words
    ]
    return Group(table, *words)


def _has_agreement(rows: tuple[Row, ...]) -> bool:
    return any(row.measurement.agreement is not None for row in rows)


def _agreement_table(rows: tuple[Row, ...]) -> Table:
    table = _table("Against the unsharded model: worst relative error of all gradients")
    table.add_column("plan", overflow="fold", min_width=10, max_width=24)
    table.add_column("error", no_wrap=True)
    table.add_column("in the gradient of", overflow="fold")
    table.add_column("tolerance", justify="right", no_wrap=True)
    table.add_column("compared in", overflow="fold")
    for row in rows:
        agreement = row.measurement.agreement
        if row.is_repeat:
            continue
        name = Text(plain(row.label), "bold")
        if agreement is None:
            table.add_row(name, Text(ABSENT))
            continue
        table.add_row(
            name,
            _agreement(row.measurement),
            Text(plain(agreement.worst_gradient)),
            Text(format_error(agreement.tolerance)),
            Text(f"{plain(agreement.dtype)}, {agreement.layers} layers"),
        )
    return table


def _agreement(measurement: Measurement) -> Text:
    agreement = measurement.agreement
    if agreement is None:
        return Text(ABSENT)
    error = format_error(agreement.worst_gradient_error)
    return Text(f"{error} ok", "green") if agreement.agrees else Text(f"{error} WRONG", "bold red")


def _findings(rows: tuple[Row, ...]) -> RenderableType | None:
    lines = []
    for row in rows:
        agreement = row.measurement.agreement
        for finding in agreement.findings if agreement else ():
            detail = (
                ""
                if finding.relative_error is None
                else f" Relative error {format_error(finding.relative_error)}."
            )
            detail += (
                "" if finding.ratio is None else f" Sharded over unsharded: {format_number(finding.ratio)}."
            )
            lines.append(_bullet(f"{row.label}: {finding.subject}: {finding.reason}{detail}", "red"))
    if not lines:
        return None
    return Panel(
        Group(*lines),
        title=Text("Not equal to the unsharded model", "bold red"),
        title_align="left",
        border_style="red",
        box=box.ROUNDED,
    )


def _verdict(comparison: Comparison) -> RenderableType:
    lines = [Text(plain(line), "bold" if index == 0 else "") for index, line in enumerate(comparison.verdict)]
    return Panel(
        Group(*lines or [Text("No verdict in this run.")]),
        title=Text("Verdict", "bold"),
        title_align="left",
        border_style="cyan",
        box=box.ROUNDED,
    )


def _bullet(text: str, style: str) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("-"), Text(plain(text), style))
    return grid


def _table(title: str) -> Table:
    return Table(
        title=Text(title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
