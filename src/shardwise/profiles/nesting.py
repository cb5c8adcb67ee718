"""CPU spans stand inside each other on their thread: who stands in whom, and what each has for itself."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.core.timeline import NONE, Spans

_AT_ONCE = 1 << 15  # spans that are Python numbers at a time


def parents(
    lane: NDArray[Any], start_ns: NDArray[Any], end_ns: NDArray[Any], is_cpu: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """For each CPU span the innermost one around it on its thread."""
    parent = np.full(len(lane), NONE, np.int32)
    chosen = np.flatnonzero(is_cpu)
    order = chosen[np.lexsort((-end_ns[chosen], start_ns[chosen], lane[chosen]))]
    ends: list[int] = []
    inner: list[int] = []  # of the spans that are open, outermost first
    previous = NONE
    for at in range(0, len(order), _AT_ONCE):
        part = order[at : at + _AT_ONCE]
        around = []
        for index, on, begin, end in zip(
            part.tolist(), lane[part].tolist(), start_ns[part].tolist(), end_ns[part].tolist(), strict=True
        ):
            if on != previous:
                ends.clear()
                inner.clear()
                previous = on
            while ends and ends[-1] <= begin:
                ends.pop()
                inner.pop()
            around.append(inner[-1] if inner else NONE)
            ends.append(end)
            inner.append(index)
        parent[part] = around
    return parent


def own_segments(spans: Spans, chosen: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(span, start, end) of the time that each chosen CPU span has for itself, without those inside it.
    Together: their union, a thread."""
    order = chosen[np.lexsort((-spans.end_ns[chosen], spans.start_ns[chosen], spans.lane[chosen]))]
    stack: list[tuple[int, int, int]] = []  # (end, op, from when on it has the time for itself)

    def leave() -> tuple[int, int, int]:
        end, op, since = stack.pop()
        if stack and stack[-1][2] < end:
            outer_end, outer, _ = stack[-1]
            stack[-1] = (outer_end, outer, end)
        return op, since, end

    previous = NONE
    for at in range(0, len(order), _AT_ONCE):
        part = order[at : at + _AT_ONCE]
        for op, begin, end, lane in zip(
            part.tolist(),
            spans.start_ns[part].tolist(),
            spans.end_ns[part].tolist(),
            spans.lane[part].tolist(),
            strict=True,
        ):
            while stack and (lane != previous or stack[-1][0] <= begin):
                left = leave()
                if left[2] > left[1]:
                    yield left
            previous = lane
            if stack and begin > stack[-1][2]:
                outer_end, outer, since = stack[-1]
                yield outer, since, begin
                stack[-1] = (outer_end, outer, begin)
            stack.append((end, op, begin))
    while stack:
        left = leave()
        if left[2] > left[1]:
            yield left
