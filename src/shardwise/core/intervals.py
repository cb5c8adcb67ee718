"""Sets of time as sorted, disjoint, half-open intervals in whole nanoseconds: exact, in numpy.

A set is an int64 array [n, 2] of (start, end), start < end, each end before the next start.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Intervals: TypeAlias = NDArray[np.int64]
EMPTY: Intervals = np.empty((0, 2), np.int64)


def union(start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]) -> Intervals:
    """The set that spans cover, in any order; spans that end before they start cover nothing."""
    covers = end_ns > start_ns
    start_ns, end_ns = start_ns[covers], end_ns[covers]
    if not len(start_ns):
        return EMPTY
    order = np.argsort(start_ns, kind="stable")
    start_ns = start_ns[order]
    reach_ns = np.maximum.accumulate(end_ns[order])
    begins = np.concatenate(([True], start_ns[1:] > reach_ns[:-1]))
    ends = np.concatenate((begins[1:], [True]))
    return np.stack((start_ns[begins], reach_ns[ends]), axis=1)


def clip(intervals: Intervals, start_ns: int, end_ns: int) -> Intervals:
    """What lies in [start_ns, end_ns)."""
    clipped = np.clip(intervals, start_ns, end_ns)
    return clipped[clipped[:, 1] > clipped[:, 0]]


def total_ns(intervals: Intervals) -> int:
    """How long a set is."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def complement(intervals: Intervals, start_ns: int, end_ns: int) -> Intervals:
    """What of [start_ns, end_ns) a set leaves free."""
    inside = clip(intervals, start_ns, end_ns)
    starts = np.concatenate(([start_ns], inside[:, 1]))
    ends = np.concatenate((inside[:, 0], [end_ns]))
    gaps = np.stack((starts, ends), axis=1)
    return gaps[gaps[:, 1] > gaps[:, 0]]


def covered_ns(
    intervals: Intervals, start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each span how much of it the set covers."""
    if not len(intervals):
        return np.zeros(len(start_ns), np.int64)
    before = np.concatenate((np.zeros(1, np.int64), (intervals[:, 1] - intervals[:, 0]).cumsum()))

    def until(times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        at = np.searchsorted(intervals[:, 0], times_ns, side="right")
        last = np.maximum(at - 1, 0)
        inside = np.minimum(times_ns, intervals[last, 1]) - intervals[last, 0]
        return np.where(at == 0, 0, before[last] + inside)

    return until(end_ns) - until(start_ns)


def without(first: Intervals, second: Intervals) -> Intervals:
    """What of the first set the second doesn't cover."""
    if not len(first) or not len(second):
        return first
    return layers((second, first), int(first[0, 0]), int(first[-1, 1]))[1]


def common(first: Intervals, second: Intervals) -> Intervals:
    """What both sets cover; where intervals of either touch, they stay apart."""
    edges = np.unique(np.concatenate((first.ravel(), second.ravel())))
    start_ns, end_ns = edges[:-1], edges[1:]
    whole = end_ns - start_ns
    inside = (covered_ns(first, start_ns, end_ns) == whole) & (covered_ns(second, start_ns, end_ns) == whole)
    return np.stack((start_ns[inside], end_ns[inside]), axis=1)


def layers(sets: Sequence[Intervals], start_ns: int, end_ns: int) -> list[Intervals]:
    """The window cut by priority: of each set what no earlier set covers; last, what none covers. Together
    they are the window, exactly."""
    edges = np.unique(
        np.concatenate(
            [np.array([start_ns, end_ns], np.int64), *(clip(each, start_ns, end_ns).ravel() for each in sets)]
        )
    )
    free = np.ones(max(0, len(edges) - 1), np.bool_)
    parts = []
    for each in sets:
        inside = clip(each, start_ns, end_ns)
        steps = np.zeros(len(edges), np.int64)
        steps[np.searchsorted(edges, inside[:, 0])] += 1
        np.subtract.at(steps, np.searchsorted(edges, inside[:, 1]), 1)
        covered = steps.cumsum()[:-1] > 0
        parts.append(_joined(edges, covered & free))
        free &= ~covered
    parts.append(_joined(edges, free))
    return parts


def _joined(edges: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Intervals:
    return union(edges[:-1][chosen], edges[1:][chosen])
