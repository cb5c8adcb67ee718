"""A small search without derivatives: each parameter in turn a step up or down while that helps, steps
halving.

For a handful of positive parameters and a cost that is cheap, rough and has kinks, such as a median. Hooke &
Jeeves 1961, in logarithms."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shardwise.predict.curves import rounded

Vector = NDArray[np.float64]


def minimise(
    cost: Callable[[Vector], float],
    start: Vector,
    *,
    step: float = 0.5,
    smallest: float = 0.004,
    most: int = 400,
) -> tuple[Vector, float]:
    """The best parameters found from `start` (all > 0) and their cost; `step` is of their logarithms."""
    at, best = np.log(start), cost(start)
    for _ in range(most):
        before = at.copy()
        for index in range(len(at)):
            for change in (step, -step):
                tried = at.copy()
                tried[index] += change
                now = cost(np.exp(tried))
                if now < best:
                    at, best = tried, now
                    break
        if np.array_equal(before, at):
            step /= 2
            if step < smallest:
                break
            continue
        ahead = 2 * at - before  # the same way again
        now = cost(np.exp(ahead))
        if now < best:
            at, best = ahead, now
    return np.exp(at), best


def log_errors(predicted: Vector, measured: Vector) -> Vector:
    """|log(predicted / measured)|; infinite where a prediction is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(np.log(predicted / measured))
    return np.where(np.isfinite(errors), errors, np.inf)


def rough(errors: Vector) -> float:
    """What a fit minimises: the median, and a little of the mean, so that the other half isn't forgotten."""
    return float(np.median(errors) + 0.1 * np.mean(np.minimum(errors, 2.0)))


def fitted(
    times: Callable[[Vector], Vector], seconds: Vector, *starts: Sequence[float]
) -> tuple[list[float], float]:
    """The parameters with which `times` meets the seconds best, from any of the starts; and the median
    residual."""
    tried = [
        minimise(lambda parameters: rough(log_errors(times(parameters), seconds)), np.array(start))
        for start in starts
    ]
    best, _ = min(tried, key=lambda pair: pair[1])
    return [rounded(value) for value in best], float(np.median(log_errors(times(best), seconds)))
