"""A run's most ordinary step as a picture: what each instant of each rank is booked on."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median_low

import numpy as np

from shardwise.core.decomposition import WorkSets, work_sets
from shardwise.core.difference import Bar, PictureRow, StepPicture
from shardwise.core.intervals import Intervals, clip, complement, layers
from shardwise.core.timeline import Timeline, Window

_MOST_RANKS = 8
_MOST_BARS = 900  # of a row
_PARTS = ("compute", "exposed_transfer", "exposed_communication", "exposed_waiting", "exposed_copy", "idle")


def picture(label: str, timelines: Sequence[Timeline]) -> StepPicture | None:
    """Of the step of median length; None where the run has no work. The first _MOST_RANKS ranks are drawn."""
    by_step: dict[int | None, list[Window]] = defaultdict(list)
    for timeline in timelines:
        for window in timeline.windows:
            by_step[window.step].append(window)
    lengths = {step: max(each.length_ns for each in windows) for step, windows in by_step.items()}
    if not lengths:
        return None
    middle = median_low(lengths.values())
    step = next(step for step, length in lengths.items() if length == middle)
    start_ns = min(window.start_ns for window in by_step[step])
    end_ns = max(window.end_ns for window in by_step[step])
    drawn = [timeline for timeline in timelines if any(window.step == step for window in timeline.windows)]
    rows = []
    for timeline in drawn[:_MOST_RANKS]:
        windows = [window for window in timeline.windows if window.step == step]
        begin, end = min(window.start_ns for window in windows), max(window.end_ns for window in windows)
        rows.append(
            _row(
                timeline.ranks[0],
                work_sets(timeline, timeline.ranks[0]),
                (begin, end),
                start_ns,
                (end_ns - start_ns) // _MOST_BARS,
            )
        )
    return StepPicture(label, step, end_ns - start_ns, tuple(rows), len(drawn) - len(rows))


def _row(rank: int, sets: WorkSets, window: tuple[int, int], origin_ns: int, least_ns: int) -> PictureRow:
    begin, end = window
    cut = layers((sets.compute, sets.transfer, sets.unsplit, sets.waiting, sets.copy), begin, end)
    parts = [
        bar
        for part, intervals in zip(_PARTS, cut, strict=True)
        for bar in _bars(part, intervals, origin_ns, least_ns)
    ]
    shown = {
        "exposed_waiting": sets.waiting,
        "exposed_communication": sets.unsplit,
        "exposed_transfer": sets.transfer,
    }
    communication = [
        bar
        for part, intervals in shown.items()
        for bar in _bars(part, clip(intervals, begin, end), origin_ns, least_ns)
    ]
    return PictureRow(rank, tuple(sorted(parts, key=lambda bar: bar.start_ns)), tuple(communication))


def _bars(part: str, intervals: Intervals, origin_ns: int, least_ns: int) -> list[Bar]:
    """Gaps and bars too short to be seen are left out, in this order: many short ones stay a row."""
    if not len(intervals):
        return []
    gaps = complement(intervals, int(intervals[0, 0]), int(intervals[-1, 1]))
    wide = gaps[gaps[:, 1] - gaps[:, 0] >= least_ns]
    joined = np.stack(
        (np.concatenate((intervals[:1, 0], wide[:, 1])), np.concatenate((wide[:, 0], intervals[-1:, 1]))),
        axis=1,
    )
    # of joined short ones only those that are really most of the stretch
    kept = []
    for start, end in joined.tolist():
        covered = clip(intervals, start, end)
        if 2 * int((covered[:, 1] - covered[:, 0]).sum()) >= end - start:
            kept.append((start, end))
        else:
            kept += [(int(a), int(b)) for a, b in covered.tolist() if b - a >= least_ns]
    return [
        Bar(part, start - origin_ns, end - origin_ns) for start, end in kept if end - start >= least_ns // 4
    ]
