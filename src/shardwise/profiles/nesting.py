"""CPU spans stand inside each other on their thread: who stands in whom, and what each has for itself."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.core.timeline import NONE, Spans


def parents(lane: NDArray[Any], start_ns: NDArray[Any], end_ns: NDArray[Any], is_cpu: NDArray[np.bool_]) -> NDArray[np.int32]:
    """For each CPU span the innermost one around it on its thread."""
    parent = np.full(len(lane), NONE, np.int32)
    chosen = np.flatnonzero(is_cpu)
    order = chosen[np.lexsort((-end_ns[chosen], start_ns[chosen], lane[chosen]))]
    stack: list[tuple[int, int]] = []
    found = []
    previous = NONE
    for index, on, begin, end in zip(order.tolist(), lane[order].tolist(), start_ns[order].tolist(), end_ns[order].tolist(), strict=True):
        if on != previous:
            stack.clear()
            previous = on
        while stack and stack[-1][0] <= begin:
            stack.pop()
        found.append(stack[-1][1] if stack else NONE)
        stack.append((end, index))
    parent[order] = np.array(found, np.int32)
    return parent


def own_segments(spans: Spans, chosen: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(span, start, end) of the time that each chosen CPU span has for itself, without those inside it. Together: their union, a thread."""
    order = chosen[np.lexsort((-spans.end_ns[chosen], spans.start_ns[chosen], spans.lane[chosen]))]
    stack: list[tuple[int, int, int]] = []  # (end, op, from when on it has the time for itself)

    def leave() -> Iterator[tuple[int, int, int]]:
        end, op, since = stack.pop()
        if end > since:
            yield op, since, end
        if stack:
            outer_end, outer, _ = stack[-1]
            stack[-1] = (outer_end, outer, max(end, stack[-1][2]))

    previous = NONE
    for op in order.tolist():
        begin, end, lane = int(spans.start_ns[op]), int(spans.end_ns[op]), int(spans.lane[op])
        while stack and (lane != previous or stack[-1][0] <= begin):
            yield from leave()
        previous = lane
        if stack and begin > stack[-1][2]:
            yield stack[-1][1], stack[-1][2], begin
            stack[-1] = (stack[-1][0], stack[-1][1], begin)
        stack.append((end, op, begin))
    while stack:
        yield from leave()
