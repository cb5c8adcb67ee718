"""Explanation or Contrast -> one HTML page: charts of plain elements with a width, a picture of a layer,
tables. Computes nothing but the widths of bars.
"""

from collections.abc import Sequence

from shardwise.core.collective import CollectiveKind, collective_name
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.program import MemoryKind, Phase
from shardwise.report.common.chart import Chart, Key, Part, Stack, chart, percent
from shardwise.report.common.page import draw
from shardwise.report.common.units import BYTES
from shardwise.report.explain import contrasts, rows, tables
from shardwise.report.explain.band import bands, largest_wire_bytes

# modules and collectives of a layer that fit beside what comes before and after the layers; more take lines
# of their own
STOPS_IN_LINE = 9


def explanation_html(explanation: Explanation, walkthrough_href: str | None = None) -> str:
    """The whole page. walkthrough_href: where the walk-through of the styles lies, if it lies anywhere."""
    return _page((explanation,), None, walkthrough_href)


def contrast_html(contrast: Contrast, walkthrough_href: str | None = None) -> str:
    """The whole page: what sets two plans apart first, then each plan by itself."""
    return _page((contrast.first, contrast.second), contrast, walkthrough_href)


def wire_chart(explanations: Sequence[Explanation]) -> Chart:
    """Bytes that the rank sends, by phase, cut by what the collectives carry out. Phases in which nothing is
    sent are left out."""
    stacks = []
    for phase in Phase:
        sent = [[group for group in one.collectives if group.phase == phase] for one in explanations]
        for index, (one, groups) in enumerate(zip(explanations, sent, strict=True)):
            if not any(sent):
                continue
            parts = []
            for kind, count in rows.tally(groups).counts:
                wire = rows.tally(group for group in groups if group.carries_out == kind).wire_bytes
                label = f"{count} {collective_name(kind)}{'s' * (count > 1)}"
                parts.append(Part(f"k-{kind.value}", label, wire))
            stacks.append(_stack(phase.value, one, explanations, parts, index))
    used = {group.carries_out for one in explanations for group in one.collectives}
    keys = [Key(f"k-{kind.value}", collective_name(kind)) for kind in CollectiveKind if kind in used]
    return chart(stacks, BYTES, keys)


def memory_chart(explanations: Sequence[Explanation]) -> Chart:
    """Bytes that a rank holds, and that live at the peak, by kind."""
    stacks = []
    for moment in ("held", "at the peak"):
        for index, one in enumerate(explanations):
            sizes = one.held if moment == "held" else one.peak.by_kind
            parts = [
                Part(f"m-{kind.value}", rows.KIND_PLURALS[kind], float(n_bytes))
                for kind, n_bytes in sizes
                if n_bytes
            ]
            stacks.append(_stack(moment, one, explanations, parts, index))
    used = {part.style for stack in stacks for part in stack.parts}
    keys = [
        Key(f"m-{kind.value}", rows.KIND_PLURALS[kind]) for kind in MemoryKind if f"m-{kind.value}" in used
    ]
    return chart(stacks, BYTES, keys)


def _stack(
    moment: str, one: Explanation, explanations: Sequence[Explanation], parts: Sequence[Part], index: int
) -> Stack:
    """The bars of two plans stand together."""
    label = moment if len(explanations) == 1 else f"{moment}, {rows.plan_name(one)}"
    return Stack(label, tuple(parts), starts_group=index == 0)


def _page(
    explanations: tuple[Explanation, ...], contrast: Contrast | None, walkthrough_href: str | None
) -> str:
    first = explanations[0]
    findings = contrasts.findings_of(contrast) if contrast else tuple(("", each) for each in first.findings)
    # the forwards of two plans stand under each other, then their backwards
    pictures = sorted(
        ((one, band) for one in explanations for band in bands(one)),
        key=lambda pair: rows.LAYER_PHASES.index(pair[1].phase),
    )
    return draw(
        "explain/explain.html.j2",
        ("explain/explain.css",),
        explanations=explanations,
        first=first,
        contrast=contrast,
        rows=rows,
        tables=tables,
        percent=percent,
        findings=findings,
        wire=wire_chart(explanations),
        memory=memory_chart(explanations),
        pictures=pictures,
        is_long=any(len(band.layer) > STOPS_IN_LINE for _, band in pictures),
        most_sent=largest_wire_bytes([band for _, band in pictures]),
        walkthrough_href=walkthrough_href,
    )
