"""Explanation and Contrast -> rich renderables for a terminal of a given width, with or without colour. Computes nothing.

Names come from the user's files: they are shown as text, never read as markup, and control characters in them are made visible.
"""

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from shardwise.core.explanation import CollectiveGroup, Contrast, Explanation, HoldingGroup
from shardwise.core.finding import Finding
from shardwise.core.program import MemoryKind
from shardwise.report.common.plain import name, plain, sentence
from shardwise.report.common.units import format_bytes, format_count, format_flops, format_share
from shardwise.report.explain import rows
from shardwise.report.explain.rows import KIND_PLURALS

# From these widths on, a collective's placements and its payload stand in columns of their own; below, on a line under it.
PLACEMENT_COLUMNS = 98
PAYLOAD_COLUMNS = 122
# From this width on, a parameter's shapes and placements do.
SHAPE_COLUMNS = 118

MODULE_MIN, MODULE_MAX = 16, 44
GAP = 2
LARGEST = 6
BAR = 20


def render_explanation(explanation: Explanation, console: Console) -> None:
    """Prints the explanation for the console's width."""
    for renderable in explanation_renderables(explanation, console.width):
        console.print(renderable)


def render_contrast(contrast: Contrast, console: Console) -> None:
    """Prints two plans side by side, what sets them apart, and the verdict."""
    for renderable in contrast_renderables(contrast, console.width):
        console.print(renderable)


def explanation_renderables(explanation: Explanation, width: int) -> list[RenderableType]:
    """Headline, findings, collectives, what a rank holds, memory, work, copies, rules and notes, laid out for `width` columns."""
    parts: list[RenderableType] = [_headline(explanation)]
    if explanation.findings:
        parts.append(_findings([("", finding) for finding in explanation.findings]))
    parts += _collectives(explanation, width)
    parts += _holdings(explanation, width)
    parts += _memory(explanation)
    parts += _work(explanation)
    parts += _copies(explanation)
    parts += _rules(explanation)
    parts += _notes(explanation.notes)
    return parts


def contrast_renderables(contrast: Contrast, width: int) -> list[RenderableType]:
    """Headline, findings, two columns, the collectives that set the plans apart, verdict and notes."""
    first, second = contrast.first, contrast.second
    labels = (_label(first), _label(second))
    parts: list[RenderableType] = [
        Padding(
            Group(
                Text.assemble((labels[0], "bold"), " against ", (labels[1], "bold"), " for ", _model(first)),
                *_setting(first),
            ),
            (0, 1, 1, 1),
        )
    ]
    findings = rows.contrast_findings(contrast)
    if findings:
        parts.append(_findings([(plain(name(label)), finding) for label, finding in findings]))
    parts.append(_contrast_table(contrast, labels))
    for groups, label in ((contrast.only_first, labels[0]), (contrast.only_second, labels[1])):
        parts.append(_section(f"Collectives that only {label} has"))
        parts += _groups(groups, width) if groups else [_line("None.", "dim")]
    if contrast.different:
        parts.append(_section("Collectives that both have, in other sizes or numbers"))
        for mine, other in contrast.different:
            parts += _groups((mine, other), width, marks=labels)
    parts.append(Text(""))
    lines = [
        Text(plain(sentence(line)), "bold" if index == 0 else "") for index, line in enumerate(contrast.lines)
    ]
    parts.append(_panel("What it comes to", "cyan", lines or [Text("Nothing to say about the difference.")]))
    parts += _notes(dict.fromkeys((*first.notes, *second.notes)))
    return parts


def _label(explanation: Explanation) -> str:
    return plain(name(explanation.plan, "(no plan)"))


def _model(explanation: Explanation) -> Text:
    return Text.assemble(
        (plain(name(explanation.model)), "bold"), f" ({format_count(explanation.parameters)} parameters)"
    )


def _setting(explanation: Explanation) -> list[Text]:
    settings = explanation.settings
    ranks = rows.world_size(explanation)
    first = Text.assemble(
        "mesh ",
        (plain(rows.mesh_text(explanation)), "bold"),
        f" · rank {explanation.rank} of {ranks} · {plain(name(explanation.device))}",
    )
    step = f"batch {settings.batch} x sequence {settings.seq} = {settings.tokens} tokens a step · {plain(name(settings.precision))}"
    if settings.accumulation > 1:
        step += f" · {settings.accumulation} micro-batches"
    if settings.recompute != "none":
        step += f" · recompute {plain(name(settings.recompute))}"
    if settings.compiled:
        step += " · compiled"
    return [first, Text(step)]


def _headline(explanation: Explanation) -> RenderableType:
    title = Text.assemble(
        _model(explanation),
        " under plan ",
        (_label(explanation), "bold"),
        f" · engine {plain(name(explanation.engine))}",
    )
    whole = rows.tally(explanation.collectives)
    summary = Text(
        f"In one step this rank sends {format_bytes(whole.wire_bytes)} in {whole.count} collectives. It holds "
        f"{format_bytes(rows.held_bytes(explanation))} of parameters, gradients and optimizer state, and {format_bytes(explanation.peak.n_bytes)} "
        "in all at the peak.",
        "bold",
    )
    told = Text(
        "Worked out without a device: bytes sent by the algorithms' formulas, memory from the tensors' shapes.",
        "dim",
    )
    return Padding(Group(title, *_setting(explanation), Text(""), summary, told), (0, 1, 1, 1))


def _findings(findings: Sequence[tuple[str, Finding]]) -> RenderableType:
    lines: list[RenderableType] = []
    for label, finding in findings:
        subject = plain(name(finding.subject))
        text = Text.assemble(
            (f"{label}: " if label else "", ""),
            (subject, "bold yellow"),
            f": {plain(sentence(finding.reason))}",
        )
        if finding.advice:
            text.append(f"\n{plain(sentence(finding.advice))}", "italic")
        lines.append(_bullet(text))
    title = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    return _panel(title, "yellow", lines)


def _collectives(explanation: Explanation, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_section("Collectives")]
    if not explanation.collectives:
        return [*parts, _line("None: this rank exchanges nothing in a step.")]
    layout = _Layout(explanation.collectives, width)
    parts.append(layout.header())
    found = [row for row in rows.phase_rows(explanation) if row.groups]
    in_layers = [row for row in found if row.phase in rows.LAYER_PHASES]
    others = [row for row in found if row.phase not in rows.LAYER_PHASES]
    for phases, sums in ((in_layers, rows.layer_tally(explanation)), (others, rows.edge_tally(explanation))):
        for row in phases:
            parts.append(_line(f"{row.phase.value}: {row.tally}", "bold cyan", above=1))
            for group in row.groups:
                parts += layout.group(group)
        if len(phases) > 1:
            parts.append(_line(f"{' + '.join(row.phase.value for row in phases)}: {sums}", "bold", above=1))
    if len(found) > 1 and in_layers and others:
        parts.append(
            _line(
                f"in all: {rows.tally(explanation.collectives)}", "bold", above=1 if len(others) == 1 else 0
            )
        )
    return parts


def _groups(groups: Sequence[CollectiveGroup], width: int, marks: Sequence[str] = ()) -> list[RenderableType]:
    layout = _Layout(groups, width, shows_phase=True)
    parts: list[RenderableType] = [layout.header()]
    for index, group in enumerate(groups):
        parts += layout.group(group, marks[index] if marks else None)
    return parts


class _Layout:
    """Columns for groups of collectives, as wide as these groups need and the terminal allows."""

    def __init__(self, groups: Sequence[CollectiveGroup], width: int, *, shows_phase: bool = False) -> None:
        self.has_placement = width >= PLACEMENT_COLUMNS
        self.has_payload = width >= PAYLOAD_COLUMNS
        self.shows_phase = shows_phase
        self.width = width
        count = max((len(_times(group.count)) for group in groups), default=3)
        columns: list[tuple[str, int, bool, Callable[[CollectiveGroup], str]]] = [
            ("", count, True, lambda group: _times(group.count)),
            ("module", 0, False, lambda group: plain(name(group.module))),
            ("collective", 0, False, self._collective),
            ("axis", 0, False, lambda group: plain(name(group.axis))),
        ]
        if self.has_placement:
            columns.append(("placement", 0, False, rows.placement_change))
        if self.has_payload:
            columns.append(("payload", 0, True, lambda group: format_bytes(group.payload_bytes)))
        columns.append(("sends", 0, True, lambda group: format_bytes(group.wire_bytes)))
        columns.append(("in all", 0, True, lambda group: format_bytes(group.total_wire_bytes)))
        widths = [
            max(len(title), least, *(len(text(group)) for group in groups))
            for title, least, _, text in columns
        ]
        widths[3] = min(widths[3], 8)
        rest = sum(widths) - widths[1] + GAP * (len(widths) - 1) + 2
        widths[1] = min(widths[1], MODULE_MAX, max(MODULE_MIN, width - rest))
        self.columns = columns
        self.widths = widths
        self.indent = count + GAP + 1

    def header(self) -> RenderableType:
        return self._row([Text(title, "dim") for title, *_ in self.columns])

    def group(self, group: CollectiveGroup, mark: str | None = None) -> list[RenderableType]:
        """The line of columns, what has no column, and the reason."""
        cells = [Text(text(group)) for *_, text in self.columns]
        cells[0].stylize("bold" if group.count > 1 else "")
        cells[1].stylize("bold")
        cells[-1].stylize("bold")
        parts = [self._row(cells)]
        about = [f"{mark}"] if mark else []
        if self.shows_phase:
            about.append(f"in {rows.phase_text(group.phase)}")
        if not self.has_placement:
            about.append(rows.placement_change(group))
        share = rows.wire_share(group)
        if not self.has_payload:
            about.append(rows.payload_text(group))
        elif share is not None:
            about.append(f"{share} of it over the wire")
        way = rows.carried_out_as(group)
        if way and not self._has_room_for_way:
            about.append(f"as {way}")
        about.append(plain(name(group.dtype)))
        rule = rows.rule_text(group)
        if rule is not None:
            about.append(plain(rule))
        parts.append(self._under(" · ".join(about), ""))
        by_data = rows.by_data_text(group)
        if by_data is not None:
            parts.append(self._under(by_data, "magenta"))
        words = " ".join(text for text in (plain(sentence(group.reason)), rows.copied_text(group)) if text)
        if words:
            parts.append(self._under(words, "dim"))
        return parts

    @property
    def _has_room_for_way(self) -> bool:
        return self.width >= PAYLOAD_COLUMNS

    def _collective(self, group: CollectiveGroup) -> str:
        return (
            rows.collective_title(group)
            if self._has_room_for_way
            else rows.collective_name(group.carries_out)
        )

    def _under(self, text: str, style: str) -> RenderableType:
        return Padding(Text(text, style, overflow="fold"), (0, 1, 0, self.indent))

    def _row(self, cells: Sequence[Text]) -> RenderableType:
        grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for (_, _, is_number, _), width in zip(self.columns, self.widths, strict=True):
            grid.add_column(width=width, justify="right" if is_number else "left", overflow="fold")
        grid.add_row(*cells)
        return Padding(grid, (0, 0, 0, 1))


def _holdings(explanation: Explanation, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_section("What the rank holds")]
    if not explanation.holdings:
        return [*parts, _line("No parameters.")]
    axes = explanation.axes
    has_shapes = width >= SHAPE_COLUMNS
    table = _table()
    table.add_column("", justify="right", no_wrap=True)
    table.add_column(
        "parameter", overflow="fold", min_width=MODULE_MIN, max_width=MODULE_MAX if has_shapes else width
    )
    if has_shapes:
        table.add_column("shape, and the rank's part", overflow="fold")
        table.add_column("placement", overflow="fold")
        table.add_column("gradient", overflow="fold")
    for title in ("para-\nmeters", "gra-\ndients", "opti-\nmizer"):
        table.add_column(title, justify="right", no_wrap=True)
    for group in explanation.holdings:
        cells = [
            Text(_times(group.count), "bold" if group.count > 1 else ""),
            Text(plain(name(group.name)), "bold"),
        ]
        gradient = Text(
            plain(rows.gradient_text(group, axes)), "yellow" if rows.gradient_differs(group) else ""
        )
        shapes = plain(rows.shape_change(group))
        placement = plain(rows.placements_text(group.placement, axes))
        if has_shapes:
            cells += [Text(shapes), Text(placement), gradient]
        else:
            cells[1].append(f"\n{shapes}\n{placement}, gradient ", "not bold dim")
            cells[1].append_text(
                gradient if rows.gradient_differs(group) else Text(gradient.plain, "not bold dim")
            )
        table.add_row(*cells, *_sizes(group))
    table.add_section()
    held = dict(explanation.held)
    kinds = (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
    table.add_row(
        Text(""),
        Text("in all", "bold"),
        *([Text("")] * 3 if has_shapes else []),
        *(Text(format_bytes(held.get(kind), "unknown"), "bold") for kind in kinds),
    )
    parts.append(Padding(table, (0, 0, 0, 1)))
    share = format_share(explanation.sharded_share)
    whole = "" if explanation.sharded_share == 1.0 else ", and the rest whole"
    parts.append(
        _line(
            f"Of {share} of the model's parameters the rank holds a part{whole}. Bytes are those of all parameters of a row.",
            "dim",
        )
    )
    return parts


def _sizes(group: HoldingGroup) -> list[Text]:
    sizes = (group.parameter_bytes, group.gradient_bytes, group.optimizer_bytes)
    return [Text(format_bytes(group.count * n_bytes)) for n_bytes in sizes]


def _memory(explanation: Explanation) -> list[RenderableType]:
    peak = explanation.peak
    parts: list[RenderableType] = [_section("Memory over the step")]
    parts.append(
        _line(f"{format_bytes(peak.n_bytes)} at the peak: {plain(rows.peak_text(explanation))}.", "bold")
    )
    table = _table()
    table.add_column("kind", no_wrap=True)
    table.add_column("held", justify="right", no_wrap=True)
    table.add_column("at the peak", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows.memory_rows(explanation):
        bar = "█" * round(BAR * row.at_peak / peak.n_bytes) if peak.n_bytes else ""
        table.add_row(KIND_PLURALS[row.kind], rows.held_text(row), rows.at_peak_text(row), Text(bar, "cyan"))
    table.add_section()
    table.add_row(
        Text("in all", "bold"),
        Text(format_bytes(rows.held_bytes(explanation)), "bold"),
        Text(format_bytes(peak.n_bytes), "bold"),
        "",
    )
    parts.append(Padding(table, (0, 0, 0, 1)))
    if peak.holders:
        parts.append(_line("The largest that the step itself adds, at the peak:", above=1))
        largest = _table()
        largest.add_column("", justify="right", no_wrap=True)
        largest.add_column("made in", overflow="fold", max_width=MODULE_MAX)
        largest.add_column("by", overflow="fold")
        largest.add_column("kind", no_wrap=True)
        largest.add_column("in all", justify="right", no_wrap=True)
        for holder in peak.holders[:LARGEST]:
            largest.add_row(
                Text(_times(holder.count)),
                Text(plain(name(holder.module)), "bold"),
                Text(f"{plain(name(holder.maker))}, {holder.phase.value}"),
                Text(holder.kind.value),
                Text(format_bytes(holder.n_bytes)),
            )
        parts.append(Padding(largest, (0, 0, 0, 1)))
        rest = peak.holders[LARGEST:]
        if rest:
            parts.append(
                _line(
                    f"and {format_bytes(sum(holder.n_bytes for holder in rest))} in {len(rest)} smaller groups.",
                    "dim",
                )
            )
    return parts


def _work(explanation: Explanation) -> list[RenderableType]:
    parts: list[RenderableType] = [_section("Work of the rank in a step")]
    table = _table()
    table.add_column("phase", no_wrap=True)
    for title in ("ops", "FLOPs", "bytes moved\nby ops", "collectives", "sends"):
        table.add_column(title, justify="right", no_wrap=True)
    totals = explanation.phases
    for found in totals:
        table.add_row(
            found.phase.value,
            str(found.ops),
            format_flops(found.flops),
            format_bytes(found.moved_bytes),
            str(found.collectives),
            format_bytes(found.wire_bytes),
        )
    table.add_section()
    table.add_row(
        *(
            Text(cell, "bold")
            for cell in (
                "in all",
                str(sum(found.ops for found in totals)),
                format_flops(sum(found.flops for found in totals)),
                format_bytes(sum(found.moved_bytes for found in totals)),
                str(sum(found.collectives for found in totals)),
                format_bytes(sum(found.wire_bytes for found in totals)),
            )
        )
    )
    parts.append(Padding(table, (0, 0, 0, 1)))
    unknown = {found.phase.value: found.unknown_ops for found in totals if found.unknown_ops}
    parts.append(
        _line("FLOPs are those of matmuls and attention; all else is bound by memory and counts 0.", "dim")
    )
    if unknown:
        counts = ", ".join(f"{count} in {phase}" for phase, count in unknown.items())
        parts.append(
            _line(
                f"Not in the catalogue of ops, so their FLOPs are unknown and not in the sums: {counts}.",
                "yellow",
            )
        )
    return parts


def _copies(explanation: Explanation) -> list[RenderableType]:
    parts: list[RenderableType] = [_section("Copies")]
    largest, rest = rows.largest_copies(explanation, LARGEST)
    if not largest:
        return [*parts, _line("None: no op of the step only copies.")]
    grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_column(justify="right", no_wrap=True)
    for group in largest:
        body = Text.assemble(
            (plain(name(group.module)), "bold"),
            f" · {plain(name(group.op))} {plain(name(group.dtype))}{rows.shape_text(group.shape)} · {group.phase.value}",
        )
        if group.reason:
            body.append(f"\n{plain(sentence(group.reason))}", "dim")
        grid.add_row(Text(_times(group.count)), body, Text(format_bytes(group.total_bytes), "bold"))
    parts.append(Padding(grid, (0, 1)))
    if rest:
        total = format_bytes(sum(group.total_bytes for group in rest))
        times = sum(group.count for group in rest)
        parts.append(_line(f"and {total} in {times} copies of {len(rest)} smaller groups.", "dim"))
    return parts


def _rules(explanation: Explanation) -> list[RenderableType]:
    parts: list[RenderableType] = [_section("Rules of the plan")]
    if not explanation.rules:
        return [*parts, _line("None.")]
    table = _table()
    table.add_column("pattern", overflow="fold", max_width=MODULE_MAX)
    table.add_column("style", overflow="fold")
    table.add_column("modules", justify="right", no_wrap=True)
    for rule in explanation.rules:
        count = Text(str(rule.modules)) if rule.modules else Text("none", "yellow")
        table.add_row(Text(plain(name(rule.pattern)), "bold"), Text(plain(name(rule.style))), count)
    return [*parts, Padding(table, (0, 0, 0, 1))]


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    lines = [_bullet(Text(plain(sentence(note)))) for note in notes]
    return [_section("Notes"), Padding(Group(*lines), (0, 1))] if lines else []


def _contrast_table(contrast: Contrast, labels: tuple[str, str]) -> RenderableType:
    table = _table()
    table.add_column("", overflow="fold")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold", max_width=26)
    table.add_column("second over first", justify="right", max_width=12)
    for row in rows.contrast_rows(contrast):
        if row.is_heading:
            table.add_section()
            table.add_row(Text(row.label, "bold cyan"), "", "", "")
            continue
        style = "bold" if row.differs else "dim"
        table.add_row(
            f"  {row.label}",
            Text(plain(row.first), style),
            Text(plain(row.second), style),
            Text(row.ratio or "", style),
        )
    return Padding(table, (0, 0, 0, 1))


def _times(count: int) -> str:
    return f"x {count}"


def _section(title: str) -> RenderableType:
    return Padding(Rule(Text(title, "bold"), align="left", style="dim", characters="─"), (1, 0, 0, 0))


def _line(text: str, style: str = "", above: int = 0, below: int = 0) -> RenderableType:
    return Padding(Text(text, style), (above, 1, below, 1))


def _bullet(text: Text) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("-"), text)
    return grid


def _panel(title: str, colour: str, lines: Sequence[RenderableType]) -> RenderableType:
    return Panel(
        Group(*lines),
        title=Text(title, f"bold {colour}"),
        title_align="left",
        border_style=colour,
        box=box.ROUNDED,
    )


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, collapse_padding=True)
