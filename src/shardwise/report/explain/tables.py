"""Explanation and Contrast -> tables and words: collectives with their reasons, what a rank holds, memory,
work, copies, rules, notes."""

from collections.abc import Iterable, Iterator, Sequence

from shardwise.core.collective import collective_name
from shardwise.core.explanation import (
    CollectiveGroup,
    Contrast,
    CopyGroup,
    Explanation,
    HoldingGroup,
    PhaseTotals,
    RuleSummary,
)
from shardwise.core.finding import Finding
from shardwise.core.program import Holder, MemoryKind
from shardwise.report.common.plain import name, repeats, sentence, step_text
from shardwise.report.common.table import (
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
    heading,
    row,
    tabled,
)
from shardwise.report.common.units import BAR, BYTES, FLOPS, NUMBER, format_bytes, format_count, format_share
from shardwise.report.explain import contrasts, rows
from shardwise.report.explain.stages import stages_tables

_SUMMED = ("ops", "unknown_ops", "flops", "moved_bytes", "collectives", "wire_bytes")
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
    blocks += findings_words([(name(label), finding) for label, finding in contrasts.findings_of(contrast)])
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
    where = (
        f"mesh {rows.mesh_text(explanation)} · rank {explanation.rank} of {rows.world_size(explanation)} · "
        f"{name(explanation.device)}"
    )
    return [Line(where), Line(step_text(settings, *repeats(settings)))]


def _headline(explanation: Explanation) -> Words:
    whole = rows.tally(explanation.collectives)
    about = (
        f"{_model(explanation)} under plan {rows.plan_name(explanation)} · engine {name(explanation.engine)}"
    )
    summary = (
        f"In one step this rank sends {format_bytes(whole.wire_bytes)} in {whole.count} collectives. It "
        "holds "
        f"{format_bytes(rows.held_bytes(explanation))} of parameters, gradients and optimizer state, and "
        f"{format_bytes(explanation.peak.n_bytes)} in all at the peak."
    )
    how = (
        "Worked out without a device: bytes sent by the algorithms' formulas, memory from the tensors' "
        "shapes."
    )
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
        said = [f"{sentence(text).removesuffix('.')}." for text in (finding.reason, finding.advice) if text]
        lines.append(Line(" ".join(said), lead=subject))
    title = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    return [Words(tuple(lines), title, Tone.CAUTION, boxed=True, items=True)]


def collectives_blocks(explanation: Explanation) -> list[Block]:
    if not explanation.collectives:
        return [Words((Line("None: this rank exchanges nothing in a step."),), "Collectives")]
    return [collectives_table(explanation.collectives, "collectives", "Collectives", _tallies(explanation))]


def _tallies(explanation: Explanation) -> tuple[Line, ...]:
    """What each phase comes to; forward and backward together; all."""
    phases = [each for each in rows.phase_rows(explanation) if each.groups]
    lines = [Line(str(each.tally), lead=f"{each.phase.value}:") for each in phases]
    in_layers = [each.phase.value for each in phases if each.phase in rows.LAYER_PHASES]
    if len(in_layers) > 1:
        lines.append(Line(str(rows.layer_tally(explanation)), lead=f"{' + '.join(in_layers)}:"))
    if len(phases) > 1:
        lines.append(Line(str(rows.tally(explanation.collectives)), Tone.STRONG, "in all:"))
    return tuple(lines)


def _kind(group: CollectiveGroup) -> Cell:
    way = rows.carried_out_as(group)
    what = collective_name(group.carries_out)
    return Cell(what, about=f"as {way}" if way else "", mark=f"k-{group.carries_out.value}")


_Group = tuple[int, CollectiveGroup]
_COLLECTIVES: Columns[_Group] = (
    (Column("Module", wraps=True), lambda each: _strong(each[1].module, rows.rule_text(each[1]) or "")),
    (Column("Phase"), lambda each: Cell(each[1].phase.value, place=each[0])),
    (Column("Times", NUMBER), lambda each: _times(each[1].count)),
    (Column("Collective", wraps=True), lambda each: _kind(each[1])),
    (Column("Axis", spills=True), lambda each: name(each[1].axis)),
    (Column("Placement", spills=True), lambda each: rows.placement_change(each[1])),
    (
        Column("Payload", BYTES, spills=True),
        lambda each: Cell(each[1].payload_bytes, about=name(each[1].dtype)),
    ),
    (
        Column("Sends, each", BYTES),
        lambda each: Cell(each[1].wire_bytes, about=rows.wire_share(each[1]) or ""),
    ),
    (
        Column("Sends, in all", BYTES, sums=True),
        lambda each: Cell(each[1].total_wire_bytes, tone=Tone.STRONG),
    ),
)


def collectives_table(
    groups: Sequence[CollectiveGroup],
    key: str,
    title: str,
    notes: Iterable[Line] = (),
    plans: Sequence[str] = (),
) -> Table:
    """plans: of each group, where they are of several."""
    of: Columns[_Group] = ((Column("Plan", wraps=True), lambda each: _strong(plans[each[0]])),)
    columns: Columns[_Group] = (*of, *_COLLECTIVES) if plans else _COLLECTIVES
    return tabled(enumerate(groups), columns, below=_why, key=key, title=title, notes=notes, sorts=True)


def _strong(text: str, about: str = "") -> Cell:
    """A module's, parameter's or pattern's name."""
    return Cell(name(text), tone=Tone.STRONG, about=about)


def _times(count: int) -> Cell:
    return Cell(count, f"x {count}")


def _why(each: _Group) -> Iterable[Line]:
    _, group = each
    by_data = rows.by_data_text(group)
    if by_data is not None:
        yield Line(by_data)
    words = " ".join(text for text in (sentence(group.reason), rows.copied_text(group)) if text)
    if words:
        yield Line(words, Tone.QUIET)


def tables_of(one: Explanation, side: str = "") -> list[Block]:
    """All but the collectives. side: of which of two plans, for the tables' keys."""
    return [
        *stages_tables(one, side),
        holdings_table(one, side),
        memory_table(one, side),
        *holders_tables(one, side),
        work_table(one, side),
        copies_table(one, side),
        rules_table(one, side),
    ]


def _gradient(group: HoldingGroup, one: Explanation) -> Cell:
    tone = Tone.CAUTION if rows.gradient_differs(group) else Tone.PLAIN
    return Cell(rows.gradient_text(group, one.axes), tone=tone)


def holdings_table(one: Explanation, side: str = "") -> Table:
    columns: Columns[HoldingGroup] = (
        (Column("Parameter", wraps=True), lambda group: _strong(group.name)),
        (Column("Count", NUMBER), lambda group: _times(group.count)),
        (Column("Whole shape", spills=True), lambda group: rows.shape_text(group.shape)),
        (Column("the rank's part", spills=True), rows.part_text),
        (Column("placement", spills=True), lambda group: rows.placements_text(group.placement, one.axes)),
        (Column("gradient", spills=True), lambda group: _gradient(group, one)),
        (Column("Parameters", BYTES), lambda group: group.count * group.parameter_bytes),
        (Column("Gradients", BYTES), lambda group: group.count * group.gradient_bytes),
        (Column("Optimizer", BYTES), lambda group: group.count * group.optimizer_bytes),
        (Column("In all", BYTES, spills=True), lambda group: group.total_bytes),
    )
    held = dict(one.held)
    sizes = (Cell(held.get(kind), None if kind in held else "unknown") for kind in _HELD)
    total = row("in all", *[None] * 5, *sizes, rows.held_bytes(one), kind=RowKind.TOTAL)
    whole = "" if one.sharded_share == 1.0 else ", and the rest whole"
    told = f"Of {format_share(one.sharded_share)} of the model's parameters the rank holds a part{whole}."
    note = Line(f"{told} Bytes are those of all parameters of a row.", Tone.QUIET)
    notes = [note if one.holdings else Line("No parameters.")]
    key, title = f"holdings{side}", "What the rank holds"
    totals = [total] if one.holdings else []
    return tabled(one.holdings, columns, *totals, key=key, title=title, notes=notes, sorts=True)


def memory_table(one: Explanation, side: str = "") -> Table:
    peak = one.peak.n_bytes
    columns: Columns[rows.MemoryRow] = (
        (Column("Kind"), lambda each: Cell(rows.KIND_PLURALS[each.kind], mark=f"m-{each.kind.value}")),
        (Column("held", BYTES), lambda each: Cell(each.held, rows.held_text(each))),
        (Column("at the peak", BYTES), lambda each: Cell(each.at_peak, rows.at_peak_text(each))),
        (Column("", BAR), lambda each: each.at_peak / peak if peak else None),
    )
    total = row("in all", rows.held_bytes(one), peak, None, kind=RowKind.TOTAL)
    note = Line(f"{format_bytes(peak)} at the peak: {rows.peak_text(one)}.", Tone.STRONG)
    key, title = f"memory{side}", "Memory over the step"
    return tabled(rows.memory_rows(one), columns, total, key=key, title=title, notes=[note])


_HOLDERS: Columns[Holder] = (
    (Column("Made in", wraps=True), lambda each: _strong(each.module)),
    (Column("By", wraps=True), lambda each: name(each.maker)),
    (Column("Phase"), lambda each: each.phase.value),
    (Column("Kind"), lambda each: each.kind.value),
    (Column("Tensors", NUMBER, sums=True), lambda each: _times(each.count)),
    (Column("In all", BYTES, sums=True), lambda each: each.n_bytes),
)


def holders_tables(one: Explanation, side: str = "") -> Iterator[Table]:
    key, title = f"holders{side}", "The largest that the step itself adds, at the peak"
    if one.peak.holders:
        yield tabled(one.peak.holders, _HOLDERS, key=key, title=title, sorts=True, short=6, long=8)


_WORK: Columns[PhaseTotals] = (
    (Column("Phase"), lambda each: each.phase.value),
    (Column("ops", NUMBER), lambda each: each.ops),
    (Column("unknown ops", NUMBER), lambda each: each.unknown_ops or None),
    (Column("FLOPs", FLOPS), lambda each: each.flops),
    (Column("bytes moved by ops", BYTES), lambda each: each.moved_bytes),
    (Column("collectives", NUMBER), lambda each: each.collectives),
    (Column("sends", BYTES), lambda each: each.wire_bytes),
)


def work_table(one: Explanation, side: str = "") -> Table:
    phases = one.phases
    sums = [sum(getattr(each, field) for each in phases) for field in _SUMMED]
    total = row("in all", sums[0], sums[1] or None, *sums[2:], kind=RowKind.TOTAL)
    told = "FLOPs are those of matmuls and attention; all else is bound by memory and counts 0."
    notes = [Line(told, Tone.QUIET)]
    unknown = ", ".join(f"{each.unknown_ops} in {each.phase.value}" for each in phases if each.unknown_ops)
    if unknown:
        told = f"Not in the catalogue of ops, so their FLOPs are unknown and not in the sums: {unknown}."
        notes.append(Line(told, Tone.CAUTION))
    key, title = f"work{side}", "Work of the rank in a step"
    return tabled(phases, _WORK, total, key=key, title=title, notes=notes)


_COPIES: Columns[CopyGroup] = (
    (Column("In", wraps=True), lambda group: _strong(group.module)),
    (Column("Phase"), lambda group: group.phase.value),
    (Column("Op", wraps=True), lambda group: name(group.op)),
    (Column("Tensor", wraps=True), lambda group: f"{name(group.dtype)}{rows.shape_text(group.shape)}"),
    (Column("Times", NUMBER, sums=True), lambda group: _times(group.count)),
    (Column("In all", BYTES, sums=True), lambda group: Cell(group.total_bytes, tone=Tone.STRONG)),
)


def copies_table(one: Explanation, side: str = "") -> Block:
    title = "Copies"
    if not one.copies:
        return Words((Line("None: no op of the step only copies."),), title)
    largest = sorted(one.copies, key=lambda group: -group.total_bytes)
    return tabled(
        largest, _COPIES, below=_why_copied, key=f"copies{side}", title=title, sorts=True, short=6, long=8
    )


def _why_copied(group: CopyGroup) -> Iterable[Line]:
    return [Line(sentence(group.reason), Tone.QUIET)] if group.reason else []


def _modules(rule: RuleSummary) -> Cell:
    return Cell(rule.modules) if rule.modules else Cell(0, "none", Tone.CAUTION)


_RULES: Columns[RuleSummary] = (
    (Column("pattern", wraps=True), lambda rule: _strong(rule.pattern)),
    (Column("style", wraps=True), lambda rule: name(rule.style)),
    (Column("modules", NUMBER), _modules),
    (
        Column("the first of them", wraps=True, spills=True),
        lambda rule: name(rule.example) if rule.modules else None,
    ),
)


def rules_table(one: Explanation, side: str = "") -> Block:
    title = "Rules of the plan"
    if not one.rules:
        return Words((Line("None."),), title)
    return tabled(one.rules, _RULES, key=f"rules{side}", title=title)


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
    for each in contrasts.rows_of(contrast):
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
