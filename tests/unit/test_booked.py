"""A step's window booked on its spans: whatever runs at once, each instant is booked once, and a part's spans
have what the decomposition says of it."""

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.core.decomposition import decompose, work_sets
from shardwise.core.intervals import EMPTY
from shardwise.core.timeline import Window
from shardwise.profiles.booked import Booked, apart, booked, calls_on_cpu
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks
from tests.unit.chrome_trace import all_reduce, kernel, launch, write

SPANS = st.lists(
    st.tuples(
        st.sampled_from(["gemm", "Memcpy DtoD", "all-reduce"]),
        st.integers(10, 300),
        st.integers(1, 90),
        st.integers(1, 3),
        st.booleans(),
    ),
    min_size=1,
    max_size=10,
)


@given(SPANS, SPANS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_instant_of_a_step_is_booked_once(
    tmp_path: Path,
    first: list[tuple[str, int, int, int, bool]],
    second: list[tuple[str, int, int, int, bool]],
) -> None:
    files = []
    for rank, made in enumerate((first, second)):
        events = []
        for number, (name, at, length, stream, is_launched) in enumerate(made, 1):
            if name == "all-reduce":
                events.append(all_reduce(at, length))
                continue
            events.append(kernel(name, at, length, stream=stream, correlation=number))
            if is_launched:
                events.append(launch(at - 9, number))
        files.append(write(tmp_path / f"rank{rank}.json", events, rank=rank))
    timelines, _ = share(read_ranks(files, workers=1))
    for timeline in timelines:
        for each in decompose(timeline):
            found = booked(
                timeline, work_sets(timeline, each.window.rank), EMPTY, each.window.rank, [each.window]
            )
            assert found.total_ns == each.window.length_ns
            assert found.compute.sum() == each.parts.compute_ns
            assert found.transfer.sum() == each.parts.exposed_transfer_ns
            assert found.unsplit.sum() == each.parts.exposed_communication_ns
            assert found.waiting.sum() == each.parts.exposed_waiting_ns
            assert found.copy.sum() == each.parts.exposed_copy_ns
            assert found.cpu_bound.sum() == each.parts.cpu_bound_idle_ns
            assert found.idle.sum() + found.after_ns == each.parts.other_idle_ns


@given(SPANS, st.sets(st.integers(0, 450), min_size=2, max_size=8), st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_steps_at_once_are_booked_as_one_after_the_other(
    tmp_path: Path, made: list[tuple[str, int, int, int, bool]], times: set[int], touching: bool
) -> None:
    events = []
    for number, (name, at, length, stream, is_launched) in enumerate(made, 1):
        is_kernel = name != "all-reduce"
        events.append(
            kernel(name, at, length, stream=stream, correlation=number)
            if is_kernel
            else all_reduce(at, length)
        )
        events += [launch(at - 9, number)] if is_kernel and is_launched else []
    (timeline,) = read_ranks([write(tmp_path / "rank0.json", events)], workers=1)
    origin = min(int(ns) for ns in timeline.spans.start_ns) - 1_000 * min(at for _, at, *_ in made)
    edges = [origin + 1_000 * each for each in sorted(times)]
    pairs = pairwise(edges) if touching else zip(edges[::2], edges[1::2], strict=False)
    windows = [Window(0, step, *pair) for step, pair in enumerate(pairs)]
    assert [*apart(reversed(windows))] == [tuple(windows)]
    sets, calls = work_sets(timeline, 0), calls_on_cpu(timeline, 0)
    at_once = booked(timeline, sets, calls, 0, windows)
    each = [booked(timeline, sets, calls, 0, [window]) for window in windows]
    for part in (field.name for field in fields(Booked)):
        np.testing.assert_array_equal(getattr(at_once, part), sum(getattr(one, part) for one in each))
    assert at_once.total_ns == sum(window.length_ns for window in windows)


def test_steps_that_overlap_are_booked_apart() -> None:
    windows = [Window(0, step, *pair) for step, pair in enumerate([(0, 9), (5, 12), (9, 20), (12, 14)])]
    assert [[each.step for each in row] for row in apart(windows)] == [[0, 2], [1, 3]]


def test_of_two_kernels_at_once_the_first_has_the_instant(tmp_path: Path) -> None:
    events = [kernel("gemm", 0, 10), kernel("other", 4, 16, stream=8)]
    (timeline,) = read_ranks([write(tmp_path / "rank0.json", events)], workers=1)
    (window,) = timeline.windows
    found = booked(timeline, work_sets(timeline, window.rank), EMPTY, window.rank, [window])
    by_name = dict(zip((timeline.name(span) for span in range(2)), found.compute.tolist(), strict=True))
    assert by_name == {"gemm": 10_000, "other": pytest.approx(10_000)}
