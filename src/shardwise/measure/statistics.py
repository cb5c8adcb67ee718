"""Paired ratios and their intervals. Standard library only; assumes no distribution.

Two plans measured in the same round saw the same machine; their ratio is paired. The interval of the median
is made of order statistics: for n sorted pairs, [x_(k), x_(n+1-k)] holds the median with probability 1 - 2
P(Binomial(n, 1/2) < k). Source: David & Nagaraja, Order Statistics, 2003, section 7.1.
"""

from collections.abc import Sequence
from math import comb
from statistics import median

from shardwise.core.measurement import Ratio

CONFIDENCE = 0.95


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """(low, high, confidence reached). With fewer than 6 values no pair of them reaches 0.95; then it is
    [min, max] and what that reaches."""
    ordered = sorted(values)
    n = len(ordered)
    if not n:
        raise ValueError("median_interval: no values")
    below = 0.0  # P(Binomial(n, 1/2) < k)
    rank, reached = 1, 1 - 2 * comb(n, 0) / 2**n
    for k in range(1, n // 2 + 1):
        below += comb(n, k - 1) / 2**n
        if 1 - 2 * below < confidence:
            break
        rank, reached = k, 1 - 2 * below
    return ordered[rank - 1], ordered[n - rank], max(0.0, reached)


def paired_ratio(values: Sequence[float], first: Sequence[float]) -> Ratio:
    """values over first, pair by pair: median, interval."""
    ratios = [value / base for value, base in zip(values, first, strict=True)]
    low, high, reached = median_interval(ratios)
    return Ratio(median(ratios), low, high, reached, len(ratios))
