"""Bars on one scale, each cut into parts: what a page draws of them. Computes widths, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.report.common.units import Format

# a part that is there at all is seen, and doesn't vanish beside one that is a million times larger
LEAST_PERCENT = 0.4


@dataclass(frozen=True, slots=True)
class Part:
    """style: a class of the page's colours."""

    style: str
    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Stack:
    """A bar before it is drawn. total: where it isn't the sum of the parts."""

    label: str
    parts: tuple[Part, ...]
    total: str | None = None
    starts_group: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """A part with its width."""

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
    starts_group: bool


@dataclass(frozen=True, slots=True)
class Key:
    """What a colour means."""

    style: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    bars: tuple[Bar, ...]
    keys: tuple[Key, ...]


def chart(
    stacks: Sequence[Stack], unit: Format, keys: Sequence[Key] | None = None, *, scale: float | None = None,
    shares: bool = False,
) -> Chart:  # fmt: skip
    """keys: by default the parts' labels, in the order in which they are met. scale: what fills the width, by
    default the longest bar. shares: whether each part's share of its bar is told."""
    sums = [sum(part.value for part in stack.parts) for stack in stacks]
    full = scale if scale is not None else max(sums, default=0.0)
    bars = []
    for stack, whole in zip(stacks, sums, strict=True):
        segments = []
        for part in stack.parts:
            share = f" ({100 * part.value / whole:.1f} %)" if shares else ""
            text = f"{unit.text(part.value)}{share}"
            segments.append(Segment(part.style, part.label, text, percent(part.value, full)))
        total = stack.total if stack.total is not None else unit.text(whole)
        bars.append(Bar(stack.label, tuple(segments), total, stack.starts_group))
    met = dict.fromkeys((part.style, part.label) for stack in stacks for part in stack.parts)
    return Chart(tuple(bars), tuple(keys if keys is not None else (Key(*each) for each in met)))


def percent(value: float, of: float) -> float:
    """A width that is seen where there is anything at all."""
    return max(LEAST_PERCENT, min(100.0, 100 * value / of)) if of and value else 0.0
