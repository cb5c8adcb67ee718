"""Explanation and Contrast -> tables and words: collectives with their reasons, what a rank holds, memory, work, copies, rules, notes."""

from collections.abc import Iterable, Sequence

from shardwise.core.explanation import CollectiveGroup, Contrast, CopyGroup, Explanation, HoldingGroup
from shardwise.core.finding import Finding
from shardwise.core.program import MemoryKind
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.table import (
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
    heading,
    numbers,
    row,
    texts,
)
from shardwise.report.common.units import (
    BAR,
    BYTES,
    COUNT,
    FLOPS,
    NUMBER,
    format_bytes,
    format_count,
    format_share,
)
from shardwise.report.explain import rows

_HELD = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)


def explanation_report(explanation: Explanation) -> Report:
    blocks: list[Block] = [_headline(explanation)]
    blocks += findings_words([("", finding) for finding in explanation.findings])
    blocks += collectives_blocks(explanation)
    blocks += tables_of(explanation)
    blocks += _notes(explanation.notes)
    title = f"{rows.plan_name(explanation)} on {name(explanation.model)}"
    return Report(title, tuple(blocks))


def contrast_report(contrast: Contrast) -> Report:
    """Headline, findings, two columns, the collectives that set the plans apart, and what it comes to."""
    first, second = contrast.first, contrast.second
    labels = (rows.plan_name(first), rows.plan_name(second))
    about = f"{labels[0]} against {labels[1]} for {_model(first)}"
    blocks: list[Block] = [Words((Line(about, Tone.STRONG), *_setting(first)))]
    blocks += findings_words([(name(label), finding) for label, finding in rows.contrast_findings(contrast)])
    blocks += [sides_table(contrast), *apart_blocks(contrast)]
    lines = [
        Line(sentence(line), Tone.PLAIN if index else Tone.STRONG)
        for index, line in enumerate(contrast.lines)
    ]
    told = tuple(lines) or (Line("Nothing to say about the difference."),)
    blocks.append(Words(told, "What it comes to", Tone.HEADING, boxed=True))
    blocks += _notes(dict.fromkeys((*first.notes, *second.notes)))
    appendix = (
        block
        for one, side in ((first, "-a"), (second, "-b"))
        for block in (collectives_table(one.collectives, f"collectives{side}", ""), *tables_of(one, side))
        if isinstance(block, Table)
    )
    return Report(f"{labels[0]} against {labels[1]} on {name(first.model)}", tuple(blocks), tuple(appendix))


def _model(explanation: Explanation) -> str:
    return f"{name(explanation.model)} ({format_count(explanation.parameters)} parameters)"


def _setting(explanation: Explanation) -> list[Line]:
    settings = explanation.settings
    where = f"mesh {rows.mesh_text(explanation)} · rank {explanation.rank} of {rows.world_size(explanation)} · {name(explanation.device)}"
    step = [
        f"batch {settings.batch} x sequence {settings.seq} = {settings.tokens} tokens a step",
        name(settings.precision),
    ]
    if settings.accumulation > 1:
        step.append(f"{settings.accumulation} micro-batches")
    if settings.recompute != "none":
        step.append(f"recompute {name(settings.recompute)}")
    return [Line(where), Line(" · ".join(step))]


def _headline(explanation: Explanation) -> Words:
    whole = rows.tally(explanation.collectives)
    about = (
        f"{_model(explanation)} under plan {rows.plan_name(explanation)} · engine {name(explanation.engine)}"
    )
    summary = (
        f"In one step this rank sends {format_bytes(whole.wire_bytes)} in {whole.count} collectives. It holds "
        f"{format_bytes(rows.held_bytes(explanation))} of parameters, gradients and optimizer state, and "
        f"{format_bytes(explanation.peak.n_bytes)} in all at the peak."
    )
    how = "Worked out without a device: bytes sent by the algorithms' formulas, memory from the tensors' shapes."
    return Words(
        (Line(about, Tone.STRONG), *_setting(explanation), Line(summary, Tone.STRONG), Line(how, Tone.QUIET))
    )


def findings_words(findings: Sequence[tuple[str, Finding]]) -> list[Block]:
    """(plan, finding) in a box; nothing where there are none."""
    if not findings:
        return []
    lines = []
    for label, finding in findings:
        subject = f"{label}: {name(finding.subject)}:" if label else f"{name(finding.subject)}:"
        lines.append(
            Line(f"{sentence(finding.reason)} {sentence(finding.advice or '')}".strip(), lead=subject)
        )
    title = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    return [Words(tuple(lines), title, Tone.CAUTION, boxed=True, items=True)]


def collectives_blocks(explanation: Explanation) -> list[Block]:
    if not explanation.collectives:
        return [Words((Line("None: this rank exchanges nothing in a step."),), "Collectives")]
    return [collectives_table(explanation.collectives, "collectives", "Collectives", _tallies(explanation))]


def _tallies(explanation: Explanation) -> tuple[Line, ...]:
    """What each phase comes to; forward and backward together; all."""
    found = [each for each in rows.phase_rows(explanation) if each.groups]
    lines = [Line(str(each.tally), lead=f"{each.phase.value}:") for each in found]
    in_layers = [each.phase.value for each in found if each.phase in rows.LAYER_PHASES]
    if len(in_layers) > 1:
        lines.append(Line(str(rows.layer_tally(explanation)), lead=f"{' + '.join(in_layers)}:"))
    if len(found) > 1:
        lines.append(Line(str(rows.tally(explanation.collectives)), Tone.STRONG, "in all:"))
    return tuple(lines)


def collectives_table(
    groups: Sequence[CollectiveGroup],
    key: str,
    title: str,
    notes: tuple[Line, ...] = (),
    plans: Sequence[str] = (),
) -> Table:
    """plans: of each group, where they are of several."""
    columns: tuple[Column, ...] = (
        Column("Module", wraps=True),
        Column("Phase"),
        Column("Times", NUMBER),
        Column("Collective", wraps=True),
        Column("Axis", spills=True),
        Column("Placement", spills=True),
        Column("Payload", BYTES, spills=True),
        Column("Sends, each", BYTES),
        Column("Sends, in all", BYTES, sums=True),
    )
    if plans:
        columns = (Column("Plan", wraps=True), *columns)
    body = []
    for index, group in enumerate(groups):
        cells = (
            (Cell(plans[index], tone=Tone.STRONG), *_collective(group, index))
            if plans
            else _collective(group, index)
        )
        body.append(row(*cells, below=tuple(_why(group))))
    return Table(key, title, columns, tuple(body), notes, sorts=True)


def _collective(group: CollectiveGroup, place: int) -> tuple[Cell, ...]:
    way = rows.carried_out_as(group)
    return (
        Cell(name(group.module), tone=Tone.STRONG, about=rows.rule_text(group) or ""),
        Cell(group.phase.value, place=place),
        Cell(group.count, f"x {group.count}"),
        Cell(
            rows.collective_name(group.carries_out),
            about=f"as {way}" if way else "",
            mark=f"k-{group.carries_out.value}",
        ),
        Cell(name(group.axis)),
        Cell(rows.placement_change(group)),
        Cell(group.payload_bytes, about=name(group.dtype)),
        Cell(group.wire_bytes, about=rows.wire_share(group) or ""),
        Cell(group.total_wire_bytes, tone=Tone.STRONG),
    )


def _why(group: CollectiveGroup) -> Iterable[Line]:
    by_data = rows.by_data_text(group)
    if by_data is not None:
        yield Line(by_data)
    words = " ".join(text for text in (sentence(group.reason), rows.copied_text(group)) if text)
    if words:
        yield Line(words, Tone.QUIET)


def tables_of(one: Explanation, side: str = "") -> list[Block]:
    """All but the collectives. side: of which of two plans, for the tables' keys."""
    return [
        holdings_table(one, side),
        memory_table(one, side),
        *holders_tables(one, side),
        work_table(one, side),
        copies_table(one, side),
        rules_table(one, side),
    ]


def holdings_table(one: Explanation, side: str = "") -> Table:
    columns = (
        Column("Parameter", wraps=True),
        Column("Count", NUMBER),
        Column("Whole shape", spills=True),
        Column("the rank's part", spills=True),
        Column("placement", spills=True),
        Column("gradient", spills=True),
        *numbers(BYTES, "Parameters", "Gradients", "Optimizer"),
        Column("In all", BYTES, spills=True),
    )
    body = [_holding(group, one) for group in one.holdings]
    held = dict(one.held)
    sizes = (Cell(held.get(kind), None if kind in held else "unknown") for kind in _HELD)
    if body:
        body.append(row("in all", *[None] * 5, *sizes, rows.held_bytes(one), kind=RowKind.TOTAL))
    whole = "" if one.sharded_share == 1.0 else ", and the rest whole"
    note = f"Of {format_share(one.sharded_share)} of the model's parameters the rank holds a part{whole}. Bytes are those of all parameters of a row."
    notes = (Line(note if body else "No parameters.", Tone.QUIET),)
    return Table(f"holdings{side}", "What the rank holds", columns, tuple(body), notes, sorts=True)


def _holding(group: HoldingGroup, one: Explanation) -> Row:
    part = "all of it" if group.shape == group.local_shape else rows.shape_text(group.local_shape)
    differs = rows.gradient_differs(group)
    sizes = (group.parameter_bytes, group.gradient_bytes, group.optimizer_bytes)
    return row(
        Cell(name(group.name), tone=Tone.STRONG),
        Cell(group.count, f"x {group.count}"),
        rows.shape_text(group.shape),
        part,
        rows.placements_text(group.placement, one.axes),
        Cell(rows.gradient_text(group, one.axes), tone=Tone.CAUTION if differs else Tone.PLAIN),
        *(group.count * size for size in sizes),
        group.total_bytes,
    )


def memory_table(one: Explanation, side: str = "") -> Table:
    columns = (Column("Kind"), Column("held", BYTES), Column("at the peak", BYTES), Column("", BAR))
    peak = one.peak.n_bytes
    body = [
        row(
            Cell(rows.KIND_PLURALS[each.kind], mark=f"m-{each.kind.value}"),
            Cell(each.held, rows.held_text(each)),
            Cell(each.at_peak, rows.at_peak_text(each)),
            each.at_peak / peak if peak else None,
        )
        for each in rows.memory_rows(one)
    ]
    body.append(row("in all", rows.held_bytes(one), peak, None, kind=RowKind.TOTAL))
    note = Line(f"{format_bytes(peak)} at the peak: {rows.peak_text(one)}.", Tone.STRONG)
    return Table(f"memory{side}", "Memory over the step", columns, tuple(body), (note,))


def holders_tables(one: Explanation, side: str = "") -> list[Table]:
    if not one.peak.holders:
        return []
    columns = (
        *texts("Made in", "By"),
        Column("Phase"),
        Column("Kind"),
        Column("Tensors", NUMBER, sums=True),
        Column("In all", BYTES, sums=True),
    )
    body = tuple(
        row(
            Cell(name(each.module), tone=Tone.STRONG),
            name(each.maker),
            each.phase.value,
            each.kind.value,
            Cell(each.count, f"x {each.count}"),
            each.n_bytes,
        )
        for each in one.peak.holders
    )
    title = "The largest that the step itself adds, at the peak"
    return [Table(f"holders{side}", title, columns, body, sorts=True, short=6, long=8)]


def work_table(one: Explanation, side: str = "") -> Table:
    columns = (
        Column("Phase"),
        *numbers(COUNT, "ops", "unknown ops"),
        Column("FLOPs", FLOPS),
        Column("bytes moved by ops", BYTES),
        Column("collectives", COUNT),
        Column("sends", BYTES),
    )
    totals = [
        (each.ops, each.unknown_ops or None, each.flops, each.moved_bytes, each.collectives, each.wire_bytes)
        for each in one.phases
    ]
    body = [
        row(each.phase.value, Cell(values[0], str(values[0])), *values[1:])
        for each, values in zip(one.phases, totals, strict=True)
    ]
    sums = [sum(value or 0 for value in column) or None for column in zip(*totals, strict=True)]
    if body:
        ops = Cell(sums[0], str(sums[0] or 0))
        body.append(
            row(
                "in all",
                ops,
                sums[1],
                sums[2] or 0,
                sums[3] or 0,
                sums[4] or 0,
                sums[5] or 0,
                kind=RowKind.TOTAL,
            )
        )
    notes = [
        Line(
            "FLOPs are those of matmuls and attention; all else is bound by memory and counts 0.", Tone.QUIET
        )
    ]
    unknown = ", ".join(
        f"{each.unknown_ops} in {each.phase.value}" for each in one.phases if each.unknown_ops
    )
    if unknown:
        told = f"Not in the catalogue of ops, so their FLOPs are unknown and not in the sums: {unknown}."
        notes.append(Line(told, Tone.CAUTION))
    return Table(f"work{side}", "Work of the rank in a step", columns, tuple(body), tuple(notes))


def copies_table(one: Explanation, side: str = "") -> Block:
    title = "Copies"
    if not one.copies:
        return Words((Line("None: no op of the step only copies."),), title)
    columns = (
        Column("In", wraps=True),
        Column("Phase"),
        *texts("Op", "Tensor"),
        Column("Times", NUMBER, sums=True),
        Column("In all", BYTES, sums=True),
    )
    largest = sorted(one.copies, key=lambda group: -group.total_bytes)
    return Table(f"copies{side}", title, columns, tuple(map(_copy, largest)), sorts=True, short=6, long=8)


def _copy(group: CopyGroup) -> Row:
    why = (Line(sentence(group.reason), Tone.QUIET),) if group.reason else ()
    return row(
        Cell(name(group.module), tone=Tone.STRONG),
        group.phase.value,
        name(group.op),
        f"{name(group.dtype)}{rows.shape_text(group.shape)}",
        Cell(group.count, f"x {group.count}"),
        Cell(group.total_bytes, tone=Tone.STRONG),
        below=why,
    )


def rules_table(one: Explanation, side: str = "") -> Block:
    title = "Rules of the plan"
    if not one.rules:
        return Words((Line("None."),), title)
    columns = (
        *texts("pattern", "style"),
        Column("modules", NUMBER),
        Column("the first of them", wraps=True, spills=True),
    )
    body = tuple(
        row(
            Cell(name(rule.pattern), tone=Tone.STRONG),
            name(rule.style),
            Cell(
                rule.modules, None if rule.modules else "none", Tone.PLAIN if rule.modules else Tone.CAUTION
            ),
            name(rule.example) if rule.modules else None,
        )
        for rule in one.rules
    )
    return Table(f"rules{side}", title, columns, body)


def _notes(notes: Iterable[str]) -> list[Block]:
    lines = tuple(Line(sentence(note)) for note in notes)
    return [Words(lines, "Notes", items=True)] if lines else []


def sides_table(contrast: Contrast) -> Table:
    """Two plans in two columns."""
    labels = (rows.plan_name(contrast.first), rows.plan_name(contrast.second))
    right = NUMBER
    columns = (
        Column("What", wraps=True),
        Column(labels[0], right),
        Column(labels[1], right),
        Column("second over first", right),
    )
    body = []
    for each in rows.contrast_rows(contrast):
        tone = Tone.STRONG if each.differs else Tone.QUIET
        cells = (Cell(text, tone=tone) for text in (each.first, each.second, each.ratio))
        body.append(heading(each.label) if each.is_heading else row(each.label, *cells))
    return Table("sides", "Side by side", columns, tuple(body))


def apart_blocks(contrast: Contrast) -> list[Block]:
    """The collectives that only one has, and those that both have otherwise."""
    labels = (rows.plan_name(contrast.first), rows.plan_name(contrast.second))
    blocks: list[Block] = []
    for groups, label, key in (
        (contrast.only_first, labels[0], "only-a"),
        (contrast.only_second, labels[1], "only-b"),
    ):
        title = f"Collectives that only {label} has"
        blocks.append(collectives_table(groups, key, title) if groups else Words((Line("None."),), title))
    pairs = [group for pair in contrast.different for group in pair]
    if pairs:
        title = "Collectives that both have, in other sizes or numbers"
        blocks.append(collectives_table(pairs, "different", title, plans=labels * len(contrast.different)))
    return blocks
