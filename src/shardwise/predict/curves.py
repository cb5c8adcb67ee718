"""Curves from samples: (size, seconds), growing in size and never falling in seconds. numpy only."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardwise.core.machine import Points, on_curve

SAME_SIZE = 1.15  # sizes within this ratio are one point
DIGITS = 4

Times = Sequence[tuple[float, float]]


def curve(times: Times) -> Points:
    """Samples (size, seconds) as a curve: like sizes as their median, then made monotone by pooling
    neighbours that fall."""
    ordered = sorted((size, seconds) for size, seconds in times if size > 0 and seconds > 0)
    groups: list[list[tuple[float, float]]] = []
    for size, seconds in ordered:
        if groups and size <= groups[-1][0][0] * SAME_SIZE:
            groups[-1].append((size, seconds))
        else:
            groups.append([(size, seconds)])
    sizes = [float(np.median([size for size, _ in group])) for group in groups]
    logs = monotone(
        np.log([float(np.median([seconds for _, seconds in group])) for group in groups]),
        [len(group) for group in groups],
    )
    return tuple(
        (float(round(size)) or 1.0, rounded(float(np.exp(log))))
        for size, log in zip(sizes, logs, strict=True)
    )


def monotone(values: NDArray[np.float64], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in squares: pool adjacent violators (Barlow et al.
    1972)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = float(value), float(weight), 1
        while pools and pools[-1][0] > mean:
            before, before_total, before_count = pools.pop()
            mean = (mean * total + before * before_total) / (total + before_total)
            total, count = total + before_total, count + before_count
        pools.append((mean, total, count))
    return [mean for mean, _, count in pools for _ in range(count)]


def median_curve(curves: Sequence[Points]) -> Points:
    """The median of several curves, at sizes a factor of four apart that at least one of them covers."""
    low, high = min(points[0][0] for points in curves), max(points[-1][0] for points in curves)
    sizes = (
        [low * 4**step for step in range(int(np.ceil(np.log(high / low) / np.log(4))) + 1)]
        if high > low
        else [low]
    )
    return curve([(size, float(np.median(_at(curves, size)))) for size in sizes])


def _at(curves: Sequence[Points], size: float) -> list[float]:
    inside = [on_curve(points, size) for points in curves if points[0][0] <= size <= points[-1][0]]
    return inside or [on_curve(points, size) for points in curves]


def residual(times: Times, points: Points) -> float:
    """Median of |log(measured / curve)|."""
    errors = [
        abs(np.log(seconds / on_curve(points, size))) for size, seconds in times if size > 0 and seconds > 0
    ]
    return float(np.median(errors)) if errors else 0.0


def rounded(value: float) -> float:
    """To as many digits as a measurement has."""
    return float(f"{value:.{DIGITS}g}")
