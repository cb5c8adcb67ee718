"""Puts the ranks of a run on one clock, by the symmetric collectives that they share.

Ends fall together: the median of what is between a rank's ends and the others' is its offset. But ranks that
share a busy machine leave late, often the same one, and such a median makes a collective impossible, in which
a rank leaves before the last has come. Each collective bounds an offset from both sides, and so does each
barrier; of the offsets with which most are possible, the one nearest to the median is taken.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from shardwise.core.waiting import Clock

Times = dict[int, tuple[int, int]]
"""One collective: rank -> (start, end), nanoseconds of that rank's clock."""


def correct(
    ranks: Sequence[int], collectives: Sequence[Times], barriers: Sequence[Times] = ()
) -> tuple[Clock, ...]:
    """What has to be taken off each rank's times; the first rank that shares a collective keeps its own.

    collectives: those whose ranks leave together. barriers: others that no rank leaves before all have come.
    """
    shared = [times for times in collectives if len(times) > 1]
    offsets = _possible(_centred(_pair_by_pair(ranks, shared), shared), [*shared, *barriers])
    apart: dict[int, list[int]] = defaultdict(list)
    for times in shared:
        ends = [end - offsets[rank] for rank, (_, end) in times.items()]
        for rank in times:
            apart[rank].append(max(ends) - min(ends))
    reference = next((offsets[rank] for rank in ranks if rank in apart), 0)
    return tuple(
        Clock(rank, offsets[rank] - reference, median_low(apart[rank]), len(apart[rank]))
        if rank in apart
        else Clock(rank, None, None, 0)
        for rank in ranks
    )


def _pair_by_pair(ranks: Sequence[int], collectives: Sequence[Times]) -> dict[int, int]:
    """From the lowest rank on, so that a clock that is off by seconds pulls nobody."""
    offsets: dict[int, int] = {}
    for root in ranks:
        if root in offsets:
            continue
        offsets[root] = 0
        frontier = [root]
        while frontier:
            known = frontier.pop(0)
            differences: dict[int, list[int]] = defaultdict(list)
            for times in collectives:
                if known in times:
                    for rank, (_, end) in times.items():
                        if rank not in offsets:
                            differences[rank].append(end - times[known][1])
            for rank, apart_ns in sorted(differences.items()):
                offsets[rank] = offsets[known] + median_low(apart_ns)
                frontier.append(rank)
    return offsets


def _centred(offsets: dict[int, int], collectives: Sequence[Times]) -> dict[int, int]:
    """Against the median of all, which the first rank's own delays don't move."""
    residuals: dict[int, list[int]] = defaultdict(list)
    for times in collectives:
        ends = {rank: end - offsets[rank] for rank, (_, end) in times.items()}
        middle = median_low(ends.values())
        for rank, end in ends.items():
            residuals[rank].append(end - middle)
    return {rank: offset + median_low(residuals.get(rank, [0])) for rank, offset in offsets.items()}


def _possible(offsets: dict[int, int], collectives: Sequence[Times]) -> dict[int, int]:
    """Rank by rank, moved as little as makes most of its collectives possible while the others stay."""
    members = [
        (rank, number, start, end)
        for number, times in enumerate(collectives)
        for rank, (start, end) in times.items()
    ]
    if not members:
        return offsets
    rank_of, number_of, starts, ends = np.array(members, np.int64).T
    moved = dict(offsets)
    for rank, offset in offsets.items():
        own = rank_of == rank
        others = ~own & np.isin(number_of, number_of[own])
        if not others.any():
            continue
        shift = np.array([moved[int(each)] for each in rank_of[others]], np.int64)
        first = np.flatnonzero(np.diff(number_of[others], prepend=-1))
        arrived = np.maximum.reduceat(starts[others] - shift, first)
        left = np.minimum.reduceat(ends[others] - shift, first)
        moved[rank] = _nearest_within_most(offset, starts[own] - left, ends[own] - arrived)
    return moved


def _nearest_within_most(wanted: int, low: NDArray[np.int64], high: NDArray[np.int64]) -> int:
    """Of the values that lie within most of the bounds [low, high], the one nearest to `wanted`."""
    holds = low <= high
    low, high = np.sort(low[holds]), np.sort(high[holds])
    values = np.concatenate(([wanted], low, high))
    within = np.searchsorted(low, values, "right") - np.searchsorted(high, values, "left")
    best = values[within == within.max()]
    return int(best[np.argmin(np.abs(best - wanted))])
