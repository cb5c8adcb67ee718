"""The picture of a search: a step's time against a device's memory, of all that was considered. Places dots,
in percent of the picture, so that it fits any width; computes nothing else.

Dots that would lie upon one another are drawn as one, which tells of how many it is: DRAWN at most.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.core.search import Considered, Found, Known, Search
from shardwise.report.common.plain import sentence
from shardwise.report.common.scale import Scale, Tick, ticks
from shardwise.report.common.units import BYTE_UNITS, SECOND_UNITS, format_bytes, format_seconds

DRAWN = 2500
# so many columns and rows of places for dots, before dots are made fewer
_PLACES = (240, 160)
# how near two numbers may stand, in percent
_NEAR = (4.0, 6.0)
# what the second picture shows: steps up to so many times the best one's
NEAR_BEST = 1.3


@dataclass(frozen=True, slots=True)
class Dot:
    """x, y: percent of the width and of the height, from the upper left corner. kind: a class of the page's
    marks. count: of considered ones that it stands for."""

    x: float
    y: float
    kind: str
    text: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """The numbers of found plans that lie near one another."""

    x: float
    y: float
    numbers: str
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """limit: where a device's memory ends. edge: of which only a bound of their time is known, at the left
    edge. considered: that are in it; left_out: without a time."""

    dots: tuple[Dot, ...]
    edge: tuple[Dot, ...]
    found: tuple[Dot, ...]
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    limit: float | None
    logs: tuple[str, ...]
    considered: int
    left_out: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """In the order in which they are drawn."""
        return tuple(dict.fromkeys(dot.kind for dot in self.dots))


def pictures(search: Search) -> tuple[Picture, ...]:
    """Of all; and, where many are far slower than the best, of what is near it."""
    whole = picture(search, search.considered)
    if whole is None:
        return ()
    if not search.found:
        return (whole,)
    most = NEAR_BEST * search.found[0].step_s
    near = tuple(each for each in search.considered if each.step_s <= most)
    zoomed = picture(search, near) if 1 < len(near) < len(search.considered) / 2 else None
    return (whole, zoomed) if zoomed is not None else (whole,)


def picture(search: Search, considered: Sequence[Considered]) -> Picture | None:
    """None where there is nothing to draw."""
    timed = [each for each in considered if _is_drawable(each.step_s)]
    drawable = [each for each in timed if _is_drawable(each.device_bytes)]
    sizeless = [each for each in timed if not _is_drawable(each.device_bytes)]
    slowest = max((each.step_s for each in timed), default=0.0)
    found = [(index, each) for index, each in enumerate(search.found, 1) if each.step_s <= slowest]
    if not drawable:
        return None
    limit = search.space.memory_bytes
    sizes = [each.device_bytes for each in drawable] + [each.memory.device_bytes for _, each in found]
    x = Scale.over([*sizes, limit] if _is_drawable(limit) else sizes)
    y = Scale.over([each.step_s for each in timed] + [each.step_s for _, each in found])
    dots = tuple(_found_dot(index, each, x, y) for index, each in found)
    return Picture(
        tuple(_thinned(drawable, x, y)),
        tuple(_at_edge(sizeless, y)),
        dots,
        tuple(_marks(dots)),
        tuple(ticks(x, BYTE_UNITS)),
        tuple(Tick(100 - each.at, each.text) for each in ticks(y, SECOND_UNITS)),
        x.at(limit) if _is_drawable(limit) else None,
        tuple(axis for axis, scale in (("memory", x), ("time", y)) if scale.is_log),
        len(timed),
        len(considered) - len(timed),
    )


def _is_drawable(value: float) -> bool:
    return 0 < value < math.inf


def kind_of(each: Considered) -> str:
    """refused: it doesn't fit, and so can't win however it is known."""
    return each.known.value if each.fits else "refused"


_ORDER = ("refused", Known.BOUND.value, Known.COMPOSED.value, Known.PREDICTED.value)


def _thinned(considered: Sequence[Considered], x: Scale, y: Scale) -> Iterator[Dot]:
    """One of each kind for each place, the fastest there; places grow until there are few enough."""
    columns, lines = _PLACES
    while True:
        places: dict[tuple[str, int, int], list[Considered]] = {}
        for each in considered:
            place = (int(x.at(each.device_bytes) * columns / 100), int(y.at(each.step_s) * lines / 100))
            places.setdefault((kind_of(each), *place), []).append(each)
        if len(places) <= DRAWN:
            break
        columns, lines = columns * 4 // 5, lines * 4 // 5
    for (kind, *_), here in sorted(places.items(), key=lambda pair: _ORDER.index(pair[0][0])):
        first = min(here, key=lambda each: each.step_s)
        more = f" (and {len(here) - 1:,} more here)" if len(here) > 1 else ""
        text = f"{_told(first)}{more}"
        yield Dot(x.at(first.device_bytes), 100 - y.at(first.step_s), kind, text, len(here))


def _at_edge(considered: Sequence[Considered], y: Scale) -> Iterator[Dot]:
    """One for each line of places."""
    places: dict[int, list[Considered]] = {}
    for each in considered:
        places.setdefault(int(y.at(each.step_s) * _PLACES[1] / 100), []).append(each)
    for here in places.values():
        first = min(here, key=lambda each: each.step_s)
        more = f" (and {len(here) - 1:,} more here)" if len(here) > 1 else ""
        text = f"{sentence(first.candidate.label)}: at least {format_seconds(first.step_s)}{more}"
        yield Dot(0.0, 100 - y.at(first.step_s), "edge", text, len(here))


def _told(each: Considered) -> str:
    least = "at least " if each.known is Known.BOUND else ""
    too_much = "" if each.fits else ", too much"
    return (
        f"{sentence(each.candidate.label)}: {least}{format_seconds(each.step_s)}, {least}"
        f"{format_bytes(each.device_bytes)}{too_much}"
    )


def _found_dot(index: int, found: Found, x: Scale, y: Scale) -> Dot:
    sizes = f"{format_seconds(found.step_s)}, {format_bytes(found.memory.device_bytes)}"
    text = f"Plan {index}, {sentence(found.candidate.label)}: {sizes}"
    return Dot(x.at(found.memory.device_bytes), 100 - y.at(found.step_s), "found", text)


def _marks(found: Sequence[Dot]) -> Iterator[Mark]:
    """A number at each; one text for those that are too near for two."""
    left = list(enumerate(found, 1))
    while left:
        (_, first), *_ = left
        near = [(n, dot) for n, dot in left if _is_near(dot, first)]
        left = [pair for pair in left if pair not in near]
        numbers = ", ".join(str(n) for n, _ in near)
        yield Mark(first.x, first.y, numbers, "; ".join(dot.text for _, dot in near))


def _is_near(one: Dot, other: Dot) -> bool:
    return abs(one.x - other.x) <= _NEAR[0] and abs(one.y - other.y) <= _NEAR[1]
