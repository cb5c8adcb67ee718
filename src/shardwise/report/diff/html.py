"""One profiled run, or two side by side -> one HTML file that needs no network. Computes widths only.

The lanes are an SVG of plain rectangles. The page's script only sorts tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.core.difference import Bar, Difference, RunProfile, StepPicture
from shardwise.core.parts import PARTS, Parts, parts_of
from shardwise.profiles.diff import run_words
from shardwise.report.common.chart import Chart, Key, Stack, chart
from shardwise.report.common.chart import Part as BarPart
from shardwise.report.common.page import draw
from shardwise.report.common.units import format_seconds
from shardwise.report.diff import rows, tables

_WIDTH = 1000.0
_ROW, _THIN, _GAP, _LEFT, _TOP = 26, 9, 14, 62, 20
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


def run_html(run: RunProfile, pictures: Sequence[StepPicture] = ()) -> str:
    """The page of one run."""
    return _page((run,), run_words(run), None, pictures)


def difference_html(difference: Difference, pictures: Sequence[StepPicture] = ()) -> str:
    """The page of two runs."""
    return _page((difference.first, difference.second), difference.verdict, difference, pictures)


def _page(
    runs: tuple[RunProfile, ...],
    words: tuple[str, ...],
    difference: Difference | None,
    pictures: Sequence[StepPicture],
) -> str:
    return draw(
        "diff/diff.html.j2",
        ("explain/explain.css", "diff/diff.css"),
        runs=runs,
        words=words,
        difference=difference,
        rows=rows,
        tables=tables,
        stacks=part_chart([(run.label, run.parts) for run in runs]),
        drawings=drawings_of(pictures),
        parts=parts_of(run.parts for run in runs),
        all_parts=PARTS,
    )


def drawings_of(pictures: Sequence[StepPicture]) -> list[Drawing]:
    """All on the scale of the longest."""
    longest = max((picture.length_ns for picture in pictures), default=1)
    return [_drawing(picture, longest) for picture in pictures]


def part_chart(runs: Sequence[tuple[str, Parts]]) -> Chart:
    """A bar for each (label, parts), on one scale."""
    stacks = []
    for label, parts in runs:
        cut = tuple(BarPart(f"p-{part.key}", part.label, part.ns(parts)) for part in PARTS if part.ns(parts))
        stacks.append(Stack(label, cut))
    keys = [Key(f"p-{part.key}", part.label) for part in parts_of(parts for _, parts in runs)]
    return chart(stacks, tables.NS, keys, shares=True)


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
    text = (
        f"{bar.part.replace('_', ' ')}, {format_seconds((bar.end_ns - bar.start_ns) / 1e9)} from "
        f"{format_seconds(bar.start_ns / 1e9)} on"
    )
    return Rectangle(f"p-{bar.part}", f"{_LEFT + bar.start_ns * scale:.2f}", y, f"{width:.2f}", height, text)
