"""Collectives over ranks: matching, clocks, waiting against transfer, blame; made traces of which everything
is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.core.decomposition import decompose
from shardwise.core.timeline import Timeline
from shardwise.core.waiting import Sharing
from shardwise.profiles.clocks import correct
from shardwise.profiles.collectives import share
from shardwise.profiles.ranks import read_ranks, trace_files
from shardwise.profiles.read import read_timeline
from tests.unit.chrome_trace import all_reduce, event, kernel, launch, step, write

WIRE_US = 10


def run(
    folder: Path, arrivals_us: list[list[float]], *, offsets_us: list[float] | None = None, **args: Any
) -> tuple[Timeline, ...]:
    """Ranks that arrive at each collective as told (arrivals_us[collective][rank]) and leave together,
    WIRE_US after the last."""
    world = len(arrivals_us[0])
    for rank in range(world):
        shift = offsets_us[rank] if offsets_us else 0
        events = [
            all_reduce(
                arrivals[rank] + shift,
                max(arrivals) + WIRE_US - arrivals[rank],
                elements=1000 + number,
                ranks=tuple(range(world)),
                args={key: value[number] for key, value in args.items()},
            )
            for number, arrivals in enumerate(arrivals_us)
        ]
        write(folder / f"rank{rank}.json", events, rank=rank, world_size=world)
    return read_ranks([folder / f"rank{rank}.json" for rank in range(world)], workers=1)


def split(sharing: Sharing) -> list[tuple[int, list[int], int]]:
    return [
        (each.last_rank, [each.waiting_ns(member) for member in each.members], each.transfer_ns)
        for each in sharing.collectives
    ]


ARRIVALS: list[list[float]] = [[100, 103, 101], [200, 180, 290], [400, 400, 405.5]]
EXPECTED = [(1, [3000, 0, 2000], 10_000), (2, [90_000, 110_000, 0], 10_000), (2, [5500, 5500, 0], 10_000)]


def test_waiting_ends_when_the_last_rank_comes(tmp_path: Path) -> None:
    timelines, sharing = share(run(tmp_path, ARRIVALS))
    assert split(sharing) == EXPECTED
    assert [clock.offset_ns for clock in sharing.clocks] == [0, 0, 0]
    first = decompose(timelines[0])[0].parts
    assert (first.exposed_waiting_ns, first.exposed_transfer_ns) == (3000 + 90_000 + 5500, 30_000)


def test_transfer_ends_when_the_middle_rank_leaves(tmp_path: Path) -> None:
    """One rank's end is late by a rounding of its profiler; the median isn't moved by it."""
    for rank, end in enumerate((150, 150, 159)):
        others = [all_reduce(1000 + at, 50, ranks=(0, 1, 2)) for at in (0, 100, 200, 300)]
        write(
            tmp_path / f"rank{rank}.json", [all_reduce(100, end - 100, ranks=(0, 1, 2)), *others], rank=rank
        )
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert [each.transfer_ns for each in sharing.collectives] == [50_000] * 5


def test_bus_bandwidth_is_wire_bytes_over_transfer(tmp_path: Path) -> None:
    _, sharing = share(run(tmp_path, ARRIVALS))
    assert sharing.collectives[0].full_bytes == 4000
    assert sharing.collectives[0].bus_bytes_per_s == pytest.approx(2 * 2 / 3 * 4000 / 10e-6)


@given(st.lists(st.integers(-(10**9), 10**9), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shifted_clock_changes_nothing_after_correction(tmp_path: Path, offsets_ns: list[int]) -> None:
    moved = [
        timeline.shifted(offset) for timeline, offset in zip(run(tmp_path, ARRIVALS), offsets_ns, strict=True)
    ]
    _, sharing = share(moved)
    assert split(sharing) == EXPECTED
    assert [clock.offset_ns for clock in sharing.clocks] == [offset - offsets_ns[0] for offset in offsets_ns]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90)), max_size=8),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_parts_of_any_step_add_up_and_hold_the_waiting(
    tmp_path: Path, arrivals: list[tuple[int, int]], work: list[tuple[int, int]]
) -> None:
    ends = [100 * number + max(pair) + 50 for number, pair in enumerate(arrivals)]
    for rank in (0, 1):
        events = [
            all_reduce(100 * number + pair[rank], ends[number] - 100 * number - pair[rank])
            for number, pair in enumerate(arrivals)
        ]
        events += [kernel("gemm", at, length) for at, length in work] if rank else []
        write(tmp_path / f"rank{rank}.json", events, rank=rank)
    timelines, sharing = share(read_ranks([tmp_path / "rank0.json", tmp_path / "rank1.json"], workers=1))
    for timeline in timelines:
        for each in decompose(timeline):
            assert each.parts.total_ns == each.window.length_ns
    waiting = [sum(each.waiting_ns(each.members[rank]) for each in sharing.collectives) for rank in (0, 1)]
    assert decompose(timelines[0])[0].parts.exposed_waiting_ns == waiting[0]  # it computes nothing
    assert decompose(timelines[1])[0].parts.exposed_waiting_ns <= waiting[1]


def test_windows_that_differ_are_aligned_by_what_the_calls_are(tmp_path: Path) -> None:
    both = ((10, 512), (100, 600), (200, 512), (300, 700))
    write(tmp_path / "rank0.json", [all_reduce(at, 20, elements=n) for at, n in both[1:]], rank=0)
    write(tmp_path / "rank1.json", [all_reduce(at + 5, 15, elements=n) for at, n in both], rank=1)
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert [each.members[0].start_ns % 1000 for each in sharing.collectives] == [0, 0, 0]
    assert [each.last_rank for each in sharing.collectives] == [1, 1, 1]
    assert [(each.count, each.why) for each in sharing.refused] == [
        (1, "not recorded by all ranks of the group")
    ]


def test_sequence_numbers_match_what_order_would_not(tmp_path: Path) -> None:
    write(
        tmp_path / "rank0.json",
        [all_reduce(at, 20, args={"Seq": seq}) for at, seq in ((100, 8), (200, 9))],
        rank=0,
    )
    write(
        tmp_path / "rank1.json",
        [all_reduce(at, 15, args={"Seq": seq}) for at, seq in ((5, 7), (105, 8), (205, 9))],
        rank=1,
    )
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert split(sharing) == [(1, [5000, 0], 15_000), (1, [5000, 0], 15_000)]
    assert sharing.refused[0].count == 1


def test_a_set_in_which_a_rank_leaves_before_the_last_has_come_is_refused_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "rank0.json", [all_reduce(100 * at, 20) for at in range(5)], rank=0)
    write(
        tmp_path / "rank1.json",
        [all_reduce(100 * at + (60 if at == 2 else 1), 19) for at in range(5)],
        rank=1,
    )
    timelines, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert len(sharing.collectives) == 4
    assert [(each.count, each.why) for each in sharing.refused] == [
        (1, "a rank leaves before the last one comes: a wrong match, or a clock that drifts")
    ]
    assert decompose(timelines[0])[0].parts.exposed_communication_ns == 20_000


def test_of_a_broadcast_waiting_and_transfer_are_not_told_apart(tmp_path: Path) -> None:
    for rank in (0, 1):
        made = [all_reduce(100 + 9 * rank, 20, args={"Collective name": "broadcast"})]
        write(tmp_path / f"rank{rank}.json", made, rank=rank)
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert not sharing.collectives
    assert (
        sharing.refused[0].why
        == "broadcast: its ranks end at different times, so waiting can't be told from transfer"
    )


def test_one_rank_alone_gets_no_split_and_is_told_why(tmp_path: Path) -> None:
    timelines, sharing = share([read_timeline(write(tmp_path / "t.json", [all_reduce(0, 20)]))])
    assert not sharing.collectives
    assert sharing.refused[0].why.startswith("one rank's file only")
    assert decompose(timelines[0])[0].parts.exposed_communication_ns == 20_000


def test_files_of_a_group_s_other_ranks_that_are_missing_are_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path / f"rank{rank}.json", [all_reduce(0, 20, ranks=(0, 1, 2, 3))], rank=rank)
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert [(each.count, each.why) for each in sharing.refused] == [
        (2, "the files of ranks 2, 3 are missing, which are in the same group")
    ]


def test_ends_that_are_late_on_the_same_rank_make_no_collective_impossible(tmp_path: Path) -> None:
    """Ranks of one busy machine: rank 0 mostly leaves 50 us late, so the median end alone would shift rank 1
    by as much."""
    for rank, leaves in enumerate(([160, 260, 360, 410, 510], [110, 210, 310, 410, 510])):
        arrives = [[0, 0, 0, 320, 400], [100, 200, 300, 400, 500]][rank]
        events = [all_reduce(at, end - at, ranks=(0, 1)) for at, end in zip(arrives, leaves, strict=True)]
        write(tmp_path / f"rank{rank}.json", events, rank=rank)
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert not sharing.refused
    assert [each.last_rank for each in sharing.collectives] == [1] * 5
    assert (
        sharing.clocks[1].offset_ns == -10_000
    )  # nearest to the median's -50 us; with more, rank 0 would leave before rank 1 comes


def test_a_barrier_bounds_a_clock_though_its_ranks_leave_apart() -> None:
    """Rank 1 leaves its only collective 50 us late, so its clock seems 50 us ahead; but it left the barrier
    40 us after rank 0 came."""
    collective = {0: (0, 100_000), 1: (0, 150_000)}
    assert correct([0, 1], [collective])[1].offset_ns == 50_000
    ahead = {0: (300_000, 370_000), 1: (200_000, 340_000)}
    assert (
        correct([0, 1], [collective], [ahead])[1].offset_ns == 40_000
    )  # or rank 1 would leave before rank 0 comes


def test_a_wrong_clock_of_some_collectives_moves_no_rank(tmp_path: Path) -> None:
    """What can't be true with any one offset is refused, and the others keep theirs."""
    for rank in (0, 1):
        events = [all_reduce(100 * at + (30 if rank and at == 4 else 0), 10, ranks=(0, 1)) for at in range(5)]
        write(tmp_path / f"rank{rank}.json", events, rank=rank)
    _, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert [refused.count for refused in sharing.refused] == [1]
    assert [clock.offset_ns for clock in sharing.clocks] == [0, 0]


def test_groups_are_matched_apart_and_their_clocks_hang_together(tmp_path: Path) -> None:
    """Two groups of two, and one of all: rank 3 shares nothing with rank 0 but the last."""
    for rank in range(4):
        pair = (0, 1) if rank < 2 else (2, 3)
        late = 7 if rank in (1, 2) else 0
        made = [
            all_reduce(100 + late, 30 - late, ranks=pair, args={"Process Group Name": f"tp{pair[0]}"}),
            all_reduce(200 + rank, 30 - rank, ranks=(0, 1, 2, 3), args={"Process Group Name": "dp"}),
        ]
        write(tmp_path / f"rank{rank}.json", made, rank=rank)
    timelines = read_ranks(trace_files(tmp_path), workers=1)
    moved = [timeline.shifted(10**9 * rank) for rank, timeline in enumerate(timelines)]
    _, sharing = share(moved)
    assert [(each.group, each.ranks, each.last_rank) for each in sharing.collectives] == [
        ("tp0", (0, 1), 1),
        ("tp2", (2, 3), 2),
        ("dp", (0, 1, 2, 3), 3),
    ]
    assert [clock.offset_ns for clock in sharing.clocks] == [10**9 * rank for rank in range(4)]


def blamed(folder: Path, late: list[dict[str, Any]]) -> str:
    write(folder / "rank0.json", [all_reduce(100, 920)], rank=0)
    write(
        folder / "rank1.json", [*late, launch(999, 3), all_reduce(1000, 20, args={"correlation": 3})], rank=1
    )
    _, sharing = share(read_ranks(trace_files(folder), workers=1))
    assert sharing.collectives[0].last_rank == 1
    blame = sharing.collectives[0].blame
    assert blame is not None
    assert blame.window_ns == 900_000
    return blame.doing


def test_the_last_rank_is_blamed_for_the_kernel_that_kept_its_device_busy(tmp_path: Path) -> None:
    assert (
        blamed(tmp_path, [kernel("void big::gemm_kernel<float>(float*)", 200, 700), kernel("other", 50, 100)])
        == "big::gemm_kernel"
    )


def test_or_for_what_its_cpu_was_in(tmp_path: Path) -> None:
    assert (
        blamed(tmp_path, [event("cpu_op", "aten::item", 120, 800), kernel("short", 120, 3)])
        == "its CPU in aten::item"
    )


def test_or_for_nothing_that_was_recorded(tmp_path: Path) -> None:
    late = [
        step(1, 0, 1010),
        event("user_annotation", "load data", 90, 905),
        event("cpu_op", "aten::add", 300, 10),
    ]
    assert (
        blamed(tmp_path, late)
        == "its CPU in no recorded op inside load data: Python, a sleep, or not scheduled"
    )


def test_files_may_count_from_different_bases(tmp_path: Path) -> None:
    """Kineto rounds the base to a quarter of a year: ranks that start around its turn differ."""
    base = 1_700_000_000_000_000_000
    write(tmp_path / "rank0.json", [all_reduce(2_000_100, 30)], rank=0, baseTimeNanoseconds=base)
    write(tmp_path / "rank1.json", [all_reduce(120, 10)], rank=1, baseTimeNanoseconds=base + 2_000_000_000)
    timelines, sharing = share(read_ranks(trace_files(tmp_path), workers=1))
    assert [timeline.origin_ns for timeline in timelines] == [base + 2_001_100_000] * 2
    assert [clock.offset_ns for clock in sharing.clocks] == [0, 0]
    assert split(sharing) == [(1, [20_000, 0], 10_000)]


def test_two_files_of_one_rank_are_refused(tmp_path: Path) -> None:
    from shardwise.core.errors import TraceError

    for name in ("a.json", "b.json"):
        write(tmp_path / name, [all_reduce(0, 20)], rank=4)
    with pytest.raises(TraceError) as caught:
        read_ranks(trace_files(tmp_path), workers=1)
    assert str(caught.value) == (
        f"{tmp_path}: 2 files are of rank 4: a.json, b.json. Keep one file per rank; "
        "steps of one rank belong in one file."
    )


def test_many_files_are_read_by_processes_and_give_the_same(tmp_path: Path) -> None:
    run(tmp_path, ARRIVALS)
    alone, together = (read_ranks(trace_files(tmp_path), workers=workers) for workers in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert one.names == other.names
        assert np.array_equal(one.spans.start_ns, other.spans.start_ns)
