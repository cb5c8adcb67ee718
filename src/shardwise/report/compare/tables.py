"""Comparison -> tables and words: a row per plan, collectives, findings, the verdict. Looks things up,
computes nothing."""

from collections.abc import Iterator

from shardwise.core.expert_load import ExpertLoad
from shardwise.core.measurement import Comparison
from shardwise.report.common.plain import repeats, step_text
from shardwise.report.common.table import (
    ABSENT,
    Block,
    Cell,
    Column,
    Columns,
    Line,
    Report,
    RowKind,
    Table,
    Tone,
    Words,
    row,
    tabled,
)
from shardwise.report.common.units import (
    BYTES,
    COUNT,
    ERROR,
    NUMBER,
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
from shardwise.report.diff.beside_tables import terms_of
from shardwise.report.diff.tables import cut_steps

# Colours of plans in page.css; further plans start again from the first.
HUES = 8


def comparison_report(comparison: Comparison) -> Report:
    rows = comparison_rows(comparison)
    blocks: list[Block] = [_headline(comparison), time_table(comparison), memory_table(comparison)]
    if has_agreement(comparison):
        blocks.append(agreement_table(comparison))
    if any(row.measurement.collectives for row in rows):
        blocks.append(collectives_table(comparison))
    if any(row.measurement.loads for row in rows):
        blocks.append(loads_table(comparison))
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
    first = (
        f"({format_count(comparison.parameters)} parameters) on {comparison.mesh} · {ranks}, "
        f"{where.backend}, {where.device} · {where.machine}"
    )
    second = step_text(settings, *repeats(settings), f"{comparison.rounds} rounds")
    lines = [Line(first, lead=comparison.model), Line(second)]
    if comparison.module is not None:
        lines.append(Line(f"measured: {comparison.module} alone, forward + backward; a step is one of both"))
    return Words(tuple(lines))


def _plan(each: PlanRow) -> Cell:
    tone = Tone.PLAIN if each.is_repeat else Tone.STRONG
    return Cell(each.label, None, tone, "noise (A/A)" if each.is_repeat else "", f"plan-{each.color % HUES}")


_PLAN = (Column("plan", wraps=True), _plan)


def _kind(each: PlanRow) -> RowKind:
    return RowKind.REPEAT if each.is_repeat else RowKind.BODY


def _measured(value: float | None) -> Cell:
    """A dash where others have a number."""
    return Cell(value, None if value is not None else ABSENT)


def _interval(each: PlanRow) -> Cell:
    if each.is_first:
        return Cell(1.0, "1 (reference)")
    return Cell(each.ratio.median if each.ratio else None, format_interval(each.ratio, ABSENT))


def time_table(comparison: Comparison) -> Table:
    rows = comparison_rows(comparison)
    first = rows[0].label if rows and len(rows[0].label) <= 12 else "the first"
    is_step = comparison.module is None
    columns: Columns[PlanRow] = (
        _PLAN,
        (
            Column("step, median" if is_step else "fwd+bwd, median", SECONDS),
            lambda each: _measured(each.step_s),
        ),
        (Column(f"time over {first} [interval]", RATIO), _interval),
        (Column("tokens per s", COUNT), lambda each: _measured(each.tokens_per_s) if is_step else None),
        (Column("module forward", SECONDS), lambda each: _measured(each.module_forward_s)),
        (Column("module backward", SECONDS), lambda each: _measured(each.module_backward_s)),
    )
    return tabled(rows, columns, kind=_kind, key="time", title="Time", notes=_time_notes(comparison))


def _time_notes(comparison: Comparison) -> Iterator[Line]:
    rows = comparison_rows(comparison)
    ratio = next((row.ratio for row in rows if row.ratio is not None), None)
    if ratio is not None:
        told = f"{format_confidence(ratio.confidence)}, from {ratio.pairs} pairs of rounds"
        yield Line(f"interval: {told}; an interval that holds 1 shows no difference.", Tone.QUIET)
    if any(row.is_repeat for row in rows):
        told = "the first plan once more. A difference as small as its own means nothing here."
        yield Line(f"noise (A/A): {told}", Tone.QUIET)
    module = measured_module(comparison)
    if module is not None:
        yield Line(f"module: {module}, timed alone.", Tone.QUIET)


_MEMORY: Columns[PlanRow] = (
    _PLAN,
    (Column("parameters", BYTES), lambda each: each.measurement.memory.parameter_bytes),
    (Column("gradients", BYTES), lambda each: each.measurement.memory.gradient_bytes),
    (Column("optimizer", BYTES), lambda each: each.measurement.memory.optimizer_bytes),
    (Column("wire, formula", BYTES), lambda each: each.measurement.wire_bytes),
    (Column("sent, measured", BYTES), lambda each: _measured(each.measurement.sent_bytes)),
    (Column("peak active", BYTES), lambda each: _measured(each.measurement.memory.active_bytes)),
    (Column("peak reserved", BYTES), lambda each: _measured(each.measurement.memory.reserved_bytes)),
    (Column("peak resident", BYTES), lambda each: _measured(each.measurement.memory.resident_bytes)),
)


def memory_table(comparison: Comparison) -> Table:
    told = "wire: what one rank sends in a step by the ring and pairwise formulas, mean over the ranks."
    notes = [Line(told, Tone.QUIET)]
    absent = not_measured(comparison)
    if absent:
        notes.append(Line(f"Not measured in this run: {'; '.join(absent)}.", Tone.QUIET))
    title = "Memory of one rank, and the bytes it sends in a step"
    return tabled(comparison_rows(comparison), _MEMORY, kind=_kind, key="memory", title=title, notes=notes)


def collectives_table(comparison: Comparison) -> Table:
    columns = (
        Column("plan", wraps=True),
        Column("collective"),
        Column("axis"),
        Column("phase"),
        Column("calls", NUMBER),
        Column("payload", BYTES, spills=True),
        Column("wire, mean", BYTES),
        Column("wire, largest rank", BYTES),
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


def loads_table(comparison: Comparison) -> Table:
    columns = (
        Column("plan", wraps=True),
        Column("experts", wraps=True),
        Column("choices of an expert, mean", COUNT),
        Column("hottest expert"),
        Column("of the mean", RATIO),
        Column("idle experts", NUMBER),
        Column("dropped", COUNT),
        Column("hottest rank"),
        Column("of the mean rank", RATIO),
    )
    body = [
        row(_plan(each), *_load_cells(load))
        for each in comparison_rows(comparison)
        for load in each.measurement.loads
        if not each.is_repeat
    ]
    told = (
        "What routers chose in the first step, over all ranks' tokens. Where ranks hold some experts each, "
        "the others wait for the hottest one."
    )
    title = "What tokens chose of the experts"
    return Table("loads", title, columns, tuple(body), (Line(told, Tone.QUIET),), sorts=True, short=12)


def _load_cells(load: ExpertLoad) -> tuple[str | float | Cell | None, ...]:
    is_shared = load.ranks > 1
    return (
        load.module,
        load.mean,
        str(load.hottest),
        load.hottest_ratio,
        load.idle,
        load.dropped,
        f"{load.hottest_rank} of {load.ranks}" if is_shared else Cell(None, ABSENT),
        load.rank_ratio if is_shared else Cell(None, ABSENT),
    )


def profile_blocks(comparison: Comparison) -> list[Block]:
    """Where a step's time goes, by the profiles."""
    profiles = comparison.profiles
    if not profiles:
        return []
    parts = [(profile.label, profile.parts) for profile in profiles]
    title = "Where a step's time goes, by its profiles (mean of all ranks)"
    lines = tuple(Line(line, lead=f"{profile.label}:") for profile in profiles for line in profile.words)
    blocks: list[Block] = [cut_steps("profiles", title, parts)]
    if lines:
        blocks.append(Words(lines, items=True))
    return [*blocks, *beside_blocks(comparison)]


def beside_blocks(comparison: Comparison) -> list[Block]:
    """Each plan's prediction beside its profile, by term."""
    blocks: list[Block] = []
    for number, profile in enumerate(comparison.profiles):
        if not profile.terms:
            continue
        blocks.append(Words(tuple(map(Line, profile.terms_words)), f"{profile.label}, predicted"))
        blocks.append(terms_of(profile.terms, f"terms-{number}", f"{profile.label}: predicted and profiled"))
    return blocks


def has_agreement(comparison: Comparison) -> bool:
    return any(run.agreement is not None for run in comparison.measurements)


def agreement_table(comparison: Comparison) -> Table:
    columns: Columns[PlanRow] = (
        _PLAN,
        (Column("gradient error", ERROR), _error),
        (Column("in the gradient of", wraps=True), lambda each: _of(each, "worst_gradient")),
        (Column("loss error", ERROR, spills=True), lambda each: _of(each, "loss_error")),
        (Column("tolerance", ERROR), lambda each: _of(each, "tolerance")),
        (Column("compared in"), _compared_in),
    )
    rows = [each for each in comparison_rows(comparison) if not each.is_repeat]
    title = "Against the unsharded model: worst relative error of all gradients"
    return tabled(rows, columns, key="agreement", title=title)


def _of(each: PlanRow, field: str) -> str | float | None:
    """A field of its agreement, where that was checked."""
    value: str | float | None = getattr(each.measurement.agreement, field, None)
    return value


def _error(each: PlanRow) -> Cell:
    agreement = each.measurement.agreement
    if agreement is None:
        return Cell(None, ABSENT)
    error = format_error(agreement.worst_gradient_error)
    if agreement.agrees:
        return Cell(agreement.worst_gradient_error, f"{error} ok", Tone.GOOD)
    return Cell(agreement.worst_gradient_error, f"{error} WRONG", Tone.BAD)


def _compared_in(each: PlanRow) -> str | None:
    agreement = each.measurement.agreement
    if agreement is None:
        return None
    layers = f", {agreement.layers} layer{'s' if agreement.layers != 1 else ''}" if agreement.layers else ""
    return f"{agreement.dtype}{layers}"


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
