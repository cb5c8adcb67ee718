"""Comparison -> tables and words: a row per plan, collectives, findings, the verdict. Looks things up, computes nothing."""

from collections.abc import Iterator

from shardwise.core.measurement import Comparison, Measurement
from shardwise.core.parts import parts_of
from shardwise.report.common.table import (
    ABSENT,
    Block,
    Cell,
    Column,
    Line,
    Report,
    Row,
    RowKind,
    Table,
    Tone,
    Words,
    numbers,
    row,
)
from shardwise.report.common.units import (
    BYTES,
    COUNT,
    ERROR,
    NUMBER,
    PERCENT,
    RATIO,
    SECONDS,
    format_confidence,
    format_count,
    format_error,
    format_interval,
    format_number,
)
from shardwise.report.compare.rows import Row as PlanRow
from shardwise.report.compare.rows import comparison_rows, measured_module, not_measured
from shardwise.report.diff.tables import NS

# Colours of plans in page.css; further plans start again from the first.
HUES = 8


def comparison_report(comparison: Comparison) -> Report:
    rows = comparison_rows(comparison)
    blocks: list[Block] = [_headline(comparison), time_table(comparison), memory_table(comparison)]
    if has_agreement(comparison):
        blocks.append(agreement_table(comparison))
    if any(row.measurement.collectives for row in rows):
        blocks.append(collectives_table(comparison))
    blocks += profile_blocks(comparison)
    lines = tuple(_findings(rows))
    if lines:
        blocks.append(Words(lines, "Not equal to the unsharded model", Tone.BAD, boxed=True, items=True))
    verdict = comparison.verdict or ("No verdict in this run.",)
    told = (Line(line, Tone.PLAIN if index else Tone.STRONG) for index, line in enumerate(verdict))
    blocks.append(Words(tuple(told), "Verdict", Tone.HEADING, boxed=True))
    if comparison.notes:
        blocks.append(Words(tuple(map(Line, comparison.notes)), items=True))
    names = " vs ".join(row.label for row in rows if not row.is_repeat)
    return Report(f"{names} on {comparison.model}", tuple(blocks))


def _headline(comparison: Comparison) -> Words:
    settings, where = comparison.settings, comparison.environment
    ranks = f"{where.world_size} rank{'s' if where.world_size != 1 else ''}"
    first = f"({format_count(comparison.parameters)} parameters) on {comparison.mesh} · {ranks}, {where.backend}, {where.device} · {where.machine}"
    second = [
        f"batch {settings.batch} x sequence {settings.seq} = {settings.tokens} tokens a step",
        settings.precision,
    ]
    if settings.accumulation > 1:
        second.append(f"{settings.accumulation} micro-batches")
    if settings.recompute != "none":
        second.append(f"recompute {settings.recompute}")
    second.append(f"{comparison.rounds} rounds")
    lines = [Line(first, lead=comparison.model), Line(" · ".join(second))]
    if comparison.module is not None:
        lines.append(Line(f"measured: {comparison.module} alone, forward + backward; a step is one of both"))
    return Words(tuple(lines))


def _plan(each: PlanRow) -> Cell:
    about = "noise (A/A)" if each.is_repeat else ""
    return Cell(
        each.label,
        tone=Tone.PLAIN if each.is_repeat else Tone.STRONG,
        about=about,
        mark=f"plan-{each.color % HUES}",
    )


def _plan_rows(comparison: Comparison, *cells: "tuple[Cell | float | str | None, ...]") -> tuple[Row, ...]:
    return tuple(
        row(_plan(each), *values, kind=RowKind.REPEAT if each.is_repeat else RowKind.BODY)
        for each, values in zip(comparison_rows(comparison), cells, strict=True)
    )


def _measured(value: float | None) -> Cell:
    """A dash where others have a number."""
    return Cell(value, None if value is not None else ABSENT)


def time_table(comparison: Comparison) -> Table:
    rows = comparison_rows(comparison)
    first = rows[0].label if rows and len(rows[0].label) <= 12 else "the first"
    columns = (
        Column("step, median" if comparison.module is None else "fwd+bwd, median", SECONDS),
        Column(f"time over {first} [interval]", RATIO),
        Column("tokens per s", COUNT),
        *numbers(SECONDS, "module forward", "module backward"),
    )
    cells = [
        (
            _measured(each.step_s),
            Cell(1.0, "1 (reference)") if each.is_first else Cell(each.ratio.median if each.ratio else None, format_interval(each.ratio, ABSENT)),
            _measured(each.tokens_per_s) if comparison.module is None else Cell(),
            _measured(each.module_forward_s),
            _measured(each.module_backward_s),
        )
        for each in rows
    ]  # fmt: skip
    return Table(
        "time", "Time", (Column("plan", wraps=True), *columns), _plan_rows(comparison, *cells), tuple(_time_notes(comparison))
    )  # fmt: skip


def _time_notes(comparison: Comparison) -> Iterator[Line]:
    rows = comparison_rows(comparison)
    ratio = next((row.ratio for row in rows if row.ratio is not None), None)
    if ratio is not None:
        yield Line(
            f"interval: {format_confidence(ratio.confidence)}, from {ratio.pairs} pairs of rounds; an interval that holds 1 shows no difference.",
            Tone.QUIET,
        )
    if any(row.is_repeat for row in rows):
        yield Line(
            "noise (A/A): the first plan once more. A difference as small as its own means nothing here.",
            Tone.QUIET,
        )
    module = measured_module(comparison)
    if module is not None:
        yield Line(f"module: {module}, timed alone.", Tone.QUIET)


def memory_table(comparison: Comparison) -> Table:
    columns = (
        *numbers(
            BYTES,
            "parameters",
            "gradients",
            "optimizer",
            "wire, formula",
            "sent, measured",
            "peak active",
            "peak reserved",
            "peak resident",
        ),
    )
    cells = [
        tuple(
            map(
                _measured,
                (
                    run.memory.parameter_bytes, run.memory.gradient_bytes, run.memory.optimizer_bytes, run.wire_bytes, run.sent_bytes,
                    run.memory.active_bytes, run.memory.reserved_bytes, run.memory.resident_bytes,
                ),
            )
        )
        for run in comparison.measurements
    ]  # fmt: skip
    notes = [
        Line(
            "wire: what one rank sends in a step by the ring and pairwise formulas, mean over the ranks.",
            Tone.QUIET,
        )
    ]
    absent = not_measured(comparison)
    if absent:
        notes.append(Line(f"Not measured in this run: {'; '.join(absent)}.", Tone.QUIET))
    title = "Memory of one rank, and the bytes it sends in a step"
    return Table(
        "memory", title, (Column("plan", wraps=True), *columns), _plan_rows(comparison, *cells), tuple(notes)
    )


def collectives_table(comparison: Comparison) -> Table:
    columns = (
        Column("plan", wraps=True),
        Column("collective"),
        Column("axis"),
        Column("phase"),
        Column("calls", NUMBER),
        Column("payload", BYTES, spills=True),
        *numbers(BYTES, "wire, mean", "wire, largest rank"),
    )
    body = []
    for each in comparison_rows(comparison):
        if each.is_repeat:
            continue
        for use in each.measurement.collectives:
            sizes = (use.payload_bytes, use.wire_bytes, use.wire_bytes_largest_rank)
            body.append(row(_plan(each), use.kind.value, use.axis, use.phase, use.count, *sizes))
        if not each.measurement.collectives:
            body.append(row(_plan(each), "none", *[None] * 6))
    return Table("collectives", "Collectives of one rank in a step", columns, tuple(body), sorts=True)


def profile_blocks(comparison: Comparison) -> list[Block]:
    """Where a step's time goes, by the profiles."""
    profiles = comparison.profiles
    if not profiles:
        return []
    columns = [
        column
        for profile in profiles
        for column in (Column(profile.label, NS), Column("of the step", PERCENT, of=profile.label))
    ]
    body = [
        row(
            Cell(part.label, mark=f"p-{part.key}"),
            *(
                value
                for profile in profiles
                for value in (part.ns(profile.parts), part.ns(profile.parts) / profile.parts.total_ns)
            ),
        )
        for part in parts_of(profile.parts for profile in profiles)
    ]
    totals = (value for profile in profiles for value in (profile.parts.total_ns, None))
    body.append(row("step", *totals, kind=RowKind.TOTAL))
    title = "Where a step's time goes, by its profiles (mean of all ranks)"
    table = Table("profiles", title, (Column("Part", wraps=True), *columns), tuple(body))
    lines = tuple(Line(line, lead=f"{profile.label}:") for profile in profiles for line in profile.words)
    return [table, Words(lines, items=True)] if lines else [table]


def has_agreement(comparison: Comparison) -> bool:
    return any(run.agreement is not None for run in comparison.measurements)


def agreement_table(comparison: Comparison) -> Table:
    columns = (
        Column("plan", wraps=True),
        Column("gradient error", ERROR),
        Column("in the gradient of", wraps=True),
        Column("loss error", ERROR, spills=True),
        Column("tolerance", ERROR),
        Column("compared in"),
    )
    body = tuple(
        row(_plan(each), *_agreement(each.measurement))
        for each in comparison_rows(comparison)
        if not each.is_repeat
    )
    return Table(
        "agreement", "Against the unsharded model: worst relative error of all gradients", columns, body
    )


def _agreement(measurement: Measurement) -> "tuple[Cell | float | str | None, ...]":
    found = measurement.agreement
    if found is None:
        return (Cell(None, ABSENT), None, None, None, None)
    error = format_error(found.worst_gradient_error)
    return (
        Cell(found.worst_gradient_error, f"{error} ok", Tone.GOOD)
        if found.agrees
        else Cell(found.worst_gradient_error, f"{error} WRONG", Tone.BAD),
        found.worst_gradient,
        found.loss_error,
        found.tolerance,
        f"{found.dtype}, {found.layers} layer{'s' if found.layers != 1 else ''}",
    )


def _findings(rows: tuple[PlanRow, ...]) -> Iterator[Line]:
    for each in rows:
        agreement = each.measurement.agreement
        for finding in agreement.findings if agreement else ():
            detail = ""
            if finding.relative_error is not None:
                detail = f" Relative error {format_error(finding.relative_error)}."
            if finding.ratio is not None:
                detail += f" Sharded over unsharded: {format_number(finding.ratio)}."
            yield Line(f"{finding.subject}: {finding.reason}{detail}", Tone.BAD, f"{each.label}:")
