"""Sets of time: parts add up, order doesn't matter."""

from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.intervals import clip, complement, covered_ns, layers, total_ns, union, without

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(-2, 20)), max_size=12)
WINDOW = st.tuples(st.integers(0, 60), st.integers(0, 40))


def of(spans: list[tuple[int, int]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    starts = np.array([start for start, _ in spans], np.int64)
    return union(starts, starts + np.array([length for _, length in spans], np.int64))


def instants(spans: list[tuple[int, int]]) -> set[int]:
    return {at for start, length in spans for at in range(start, start + length)}


def covered(intervals: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> set[int]:
    return {at for start, end in intervals.tolist() for at in range(start, end)}


@given(SPANS)
def test_a_union_covers_what_its_spans_cover_in_sorted_disjoint_intervals(
    spans: list[tuple[int, int]],
) -> None:
    found = of(spans)
    assert covered(found) == instants(spans)
    flat = found.ravel().tolist()
    assert flat == sorted(set(flat))


@given(SPANS, st.randoms())
def test_the_order_of_spans_does_not_matter(spans: list[tuple[int, int]], random: Random) -> None:
    shuffled = list(spans)
    random.shuffle(shuffled)
    assert np.array_equal(of(spans), of(shuffled))


@given(SPANS, SPANS)
def test_what_a_set_covers_of_spans(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    spans = [(start, start + length) for start, length in second if length >= 0]
    starts, ends = (np.array(side, np.int64) for side in (zip(*spans, strict=True) if spans else ((), ())))
    assert covered_ns(of(first), starts, ends).tolist() == [
        len(instants(first) & set(range(start, end))) for start, end in spans
    ]


@given(st.lists(SPANS, max_size=5), WINDOW)
def test_layers_cut_a_window_by_priority_and_add_up_to_it(
    sets: list[list[tuple[int, int]]], window: tuple[int, int]
) -> None:
    start, end = window[0], window[0] + window[1]
    parts = layers([of(spans) for spans in sets], start, end)
    free = set(range(start, end))
    for spans, part in zip(sets, parts, strict=False):
        assert covered(part) == instants(spans) & free
        free -= instants(spans)
    assert covered(parts[-1]) == free
    assert sum(map(total_ns, parts)) == end - start


@given(SPANS, SPANS, WINDOW)
def test_set_arithmetic(
    first: list[tuple[int, int]], second: list[tuple[int, int]], window: tuple[int, int]
) -> None:
    start, end = window[0], window[0] + window[1]
    inside = set(range(start, end))
    assert covered(without(of(first), of(second))) == instants(first) - instants(second)
    assert covered(clip(of(first), start, end)) == instants(first) & inside
    assert covered(complement(of(first), start, end)) == inside - instants(first)
