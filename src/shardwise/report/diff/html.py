"""One profiled run, or two side by side -> one HTML file that needs no network; the rules of report/page.py hold. Computes widths only.

The lanes are an SVG of plain rectangles. The page's script only sorts tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shardwise.core.difference import Bar, Difference, RunProfile, StepPicture
from shardwise.report.common.page import csp_hash, page_environment, template_source
from shardwise.report.common.units import format_seconds
from shardwise.report.diff import rows

_WIDTH = 1000.0
_ROW, _THIN, _GAP, _LEFT, _TOP = 26, 9, 14, 62, 20
_LINES, _CPU_LINES = 60, 25
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Rectangle:
    """style: a class of diff.css."""

    style: str
    x: str
    y: float
    width: str
    height: float
    text: str


@dataclass(frozen=True, slots=True)
class Label:
    x: str
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A StepPicture in the coordinates of an SVG."""

    title: str
    height: float
    rectangles: tuple[Rectangle, ...]
    ranks: tuple[Label, ...]
    ticks: tuple[Label, ...]
    left_out: int


def run_html(run: RunProfile, words: Sequence[str], pictures: Sequence[StepPicture]) -> str:
    """The page of one run."""
    return _page((run,), tuple(words), None, pictures)


def difference_html(difference: Difference, pictures: Sequence[StepPicture]) -> str:
    """The page of two runs."""
    return _page((difference.first, difference.second), difference.verdict, difference, pictures)


def _page(
    runs: tuple[RunProfile, ...],
    words: tuple[str, ...],
    difference: Difference | None,
    pictures: Sequence[StepPicture],
) -> str:
    environment = page_environment()
    environment.globals.update(rows=rows, time=rows.time, signed=rows.signed)
    script = template_source(environment, "common/page.js")
    css = "".join(
        template_source(environment, name)
        for name in ("common/page.css", "common/bars.css", "explain/explain.css", "diff/diff.css")
    )
    longest = max((picture.length_ns for picture in pictures), default=1)
    return environment.get_template("diff/diff.html.j2").render(
        runs=runs,
        words=words,
        difference=difference,
        part_rows=rows.part_rows(runs),
        stacks=rows.part_stacks([(run.label, run.parts) for run in runs]),
        drawings=[_drawing(picture, longest) for picture in pictures],
        parts=rows.parts_of([run.parts for run in runs]),
        most_lines=_LINES,
        most_cpu=_CPU_LINES,
        css=Markup(css),
        script=Markup(script),
        script_hash=Markup(csp_hash(script)),
    )


def _drawing(picture: StepPicture, longest_ns: int) -> Drawing:
    """All pictures of a page have one scale, so that a shorter step is shorter."""
    scale = (_WIDTH - _LEFT) / longest_ns
    rectangles: list[Rectangle] = []
    labels = []
    y = float(_TOP)
    for row in picture.rows:
        rectangles += [_rectangle(bar, y, _ROW, scale) for bar in row.parts]
        rectangles += [_rectangle(bar, y + _ROW + 2, _THIN, scale) for bar in row.communication]
        labels.append(Label("0", y + _ROW - 8, f"rank {row.rank}"))
        y += _ROW + 2 + _THIN + _GAP
    ticks = tuple(
        Label(
            f"{_LEFT + part * picture.length_ns / _TICKS * scale:.1f}",
            12,
            format_seconds(part * picture.length_ns / _TICKS / 1e9),
        )
        for part in range(_TICKS + 1)
        if picture.length_ns * scale > _WIDTH / 3 or part in (0, _TICKS)
    )
    title = picture.label if picture.step is None else f"{picture.label}, step {picture.step}"
    return Drawing(title, y, tuple(rectangles), tuple(labels), ticks, picture.ranks_left_out)


def _rectangle(bar: Bar, y: float, height: float, scale: float) -> Rectangle:
    width = max(0.35, (bar.end_ns - bar.start_ns) * scale)
    text = f"{bar.part.replace('_', ' ')}, {format_seconds((bar.end_ns - bar.start_ns) / 1e9)} from {format_seconds(bar.start_ns / 1e9)} on"
    return Rectangle(f"p-{bar.part}", f"{_LEFT + bar.start_ns * scale:.2f}", y, f"{width:.2f}", height, text)
