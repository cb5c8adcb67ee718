"""The largest of n: what is expected of it where each is drawn by itself from a normal distribution with mean
0 and standard deviation 1. Standard library only.

    E[max]   = integral over x > 0 of 1 - F(x)^n, less the same over x < 0 of F(x)^n
    E[max^2] = twice the integral over x > 0 of x (1 - F(x)^n), less twice that over x < 0 of x F(x)^n

F is the normal distribution function. Source: David and Nagaraja, Order Statistics, 3rd edition (2003),
sections 2.1 and 3.1; integrated as they stand, where Blom (1958) approximates E[max] by the quantile of
(n - 0.375) / (n + 0.25), 4 % too large at n = 2, and Royston (1982, AS 177) tabulates it.
"""

import math
from functools import cache

_STEP = 1 / 256
_FAR = 10.0
"""F(-10) is 8e-24: of a million variates none lies beyond it."""


@cache
def expected_maximum(count: int) -> float:
    """Of `count` normal variates, in their standard deviations; 0 of one alone."""
    return _moments(count)[0]


@cache
def variance_of_maximum(count: int) -> float:
    """Of the largest of `count` normal variates, in their variances; 1 of one alone."""
    first, second = _moments(count)
    return second - first * first


@cache
def _moments(count: int) -> tuple[float, float]:
    """Of the maximum and of its square, by the middles of steps."""
    if count == 1:
        return 0.0, 1.0
    first = second = 0.0
    for index in range(round(_FAR / _STEP)):
        x = (index + 0.5) * _STEP
        tail = math.erfc(x / math.sqrt(2)) / 2
        above = -math.expm1(count * math.log1p(-tail))
        below = math.exp(count * math.log(tail))
        first += (above - below) * _STEP
        second += 2 * x * (above + below) * _STEP
    return first, second
