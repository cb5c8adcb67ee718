"""Explanation or Contrast -> one HTML file that needs no network: text through jinja2's autoescape, charts of plain elements with a width.

Every number is in the page as text, so it reads and prints without its script, which only sorts tables. The rules of report/page.py hold:
escaped text, a content security policy that lets just this script run. Computes nothing but the widths of bars.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from shardwise.core.collective import CollectiveKind
from shardwise.core.explanation import Contrast, Explanation
from shardwise.core.finding import Finding
from shardwise.core.program import MemoryKind, Phase
from shardwise.report.common import units
from shardwise.report.common.page import csp_hash, page_environment, template_source
from shardwise.report.common.plain import name, sentence
from shardwise.report.explain import rows
from shardwise.report.explain.band import bands, largest_wire_bytes
from shardwise.report.explain.rows import LAYER_PHASES

# groups of holders and of copies that stand in the open; the rest is under a summary
LARGEST = 8

# modules and collectives of a layer that fit beside what comes before and after the layers; more take lines of their own
STOPS_IN_LINE = 9

# a bar's part that is there at all is seen, and doesn't vanish beside one that is a million times larger
LEAST_PERCENT = 0.4


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar. style: a class of explain.css."""

    style: str
    label: str
    text: str
    percent: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart: its name, its parts and what they come to."""

    label: str
    segments: tuple[Segment, ...]
    total: str
    starts_group: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """What a colour means."""

    style: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars on one scale."""

    bars: tuple[Bar, ...]
    keys: tuple[Key, ...]


def explanation_html(explanation: Explanation, walkthrough_href: str | None = None) -> str:
    """The whole page. walkthrough_href: where the walk-through of the styles lies, if it lies anywhere."""
    return _page((explanation,), None, walkthrough_href)


def contrast_html(contrast: Contrast, walkthrough_href: str | None = None) -> str:
    """The whole page: what sets two plans apart first, then each plan by itself."""
    return _page((contrast.first, contrast.second), contrast, walkthrough_href)


def wire_chart(explanations: Sequence[Explanation]) -> Chart:
    """Bytes that the rank sends, by phase, cut by what the collectives carry out. Phases in which nothing is sent are left out."""
    found: list[tuple[str, list[tuple[str, str, float]], bool]] = []
    kinds: set[CollectiveKind] = set()
    for phase in Phase:
        if not any(group.phase == phase for one in explanations for group in one.collectives):
            continue
        for index, one in enumerate(explanations):
            parts = []
            for kind in CollectiveKind:
                sent = rows.tally(
                    group for group in one.collectives if group.phase == phase and group.carries_out == kind
                )
                if sent.counts:
                    kinds.add(kind)
                    parts.append(
                        (
                            f"k-{kind.value}",
                            f"{sent.count} {rows.collective_name(kind)}{'s' * (sent.count > 1)}",
                            sent.wire_bytes,
                        )
                    )
            label = phase.value if len(explanations) == 1 else f"{phase.value}, {name(one.plan)}"
            found.append((label, parts, index == 0))
    keys = tuple(
        Key(f"k-{kind.value}", rows.collective_name(kind)) for kind in CollectiveKind if kind in kinds
    )
    return Chart(_bars(found), keys)


def memory_chart(explanations: Sequence[Explanation]) -> Chart:
    """Bytes that a rank holds, and that live at the peak, by kind."""
    found: list[tuple[str, list[tuple[str, str, float]], bool]] = []
    kinds: set[MemoryKind] = set()
    for moment in ("held", "at the peak"):
        for index, one in enumerate(explanations):
            sizes = one.held if moment == "held" else one.peak.by_kind
            parts = [
                (f"m-{kind.value}", rows.KIND_PLURALS[kind], float(n_bytes))
                for kind, n_bytes in sizes
                if n_bytes
            ]
            kinds |= {kind for kind, n_bytes in sizes if n_bytes}
            label = moment if len(explanations) == 1 else f"{moment}, {name(one.plan)}"
            found.append((label, parts, index == 0))
    keys = tuple(Key(f"m-{kind.value}", rows.KIND_PLURALS[kind]) for kind in MemoryKind if kind in kinds)
    return Chart(_bars(found), keys)


def _bars(found: Sequence[tuple[str, list[tuple[str, str, float]], bool]]) -> tuple[Bar, ...]:
    largest = max((sum(size for _, _, size in parts) for _, parts, _ in found), default=0.0)
    return tuple(
        Bar(
            label,
            tuple(
                Segment(
                    style,
                    text,
                    units.format_bytes(size),
                    max(LEAST_PERCENT, 100 * size / largest) if largest and size else 0.0,
                )
                for style, text, size in parts
            ),
            units.format_bytes(sum(size for _, _, size in parts)),
            starts_group,
        )
        for label, parts, starts_group in found
    )


def _page(
    explanations: tuple[Explanation, ...], contrast: Contrast | None, walkthrough_href: str | None
) -> str:
    environment = page_environment()
    environment.globals.update(
        bytes=units.format_bytes,
        count=units.format_count,
        flops=units.format_flops,
        share=units.format_share,
        rows=rows,
        name=name,
        sentence=sentence,
        largest=LARGEST,
        percent=_percent,
        breakable=_breakable,
    )
    script = template_source(environment, "common/page.js")
    css = "".join(
        template_source(environment, sheet)
        for sheet in ("common/page.css", "common/bars.css", "explain/explain.css")
    )
    found: Iterable[tuple[str, Finding]]
    found = (
        rows.contrast_findings(contrast)
        if contrast
        else (("", finding) for finding in explanations[0].findings)
    )
    # the forwards of two plans stand under each other, then their backwards
    pictures = sorted(
        ((one, band) for one in explanations for band in bands(one)),
        key=lambda pair: LAYER_PHASES.index(pair[1].phase),
    )
    return environment.get_template("explain/explain.html.j2").render(
        explanations=explanations,
        first=explanations[0],
        contrast=contrast,
        findings=tuple(found),
        wire=wire_chart(explanations),
        memory=memory_chart(explanations),
        pictures=pictures,
        is_long=any(len(band.layer) > STOPS_IN_LINE for _, band in pictures),
        most_sent=largest_wire_bytes([band for _, band in pictures]),
        walkthrough_href=walkthrough_href,
        css=Markup(css),
        script=Markup(script),
        script_hash=Markup(csp_hash(script)),
    )


def _percent(value: float, of: float) -> str:
    """A width in a style attribute."""
    return f"{max(LEAST_PERCENT, min(100.0, 100 * value / of)):.2f}" if of and value else "0"


def _breakable(text: str) -> Markup:
    """A name that may be broken after its dots and underscores."""
    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(escape(name(text)))))
