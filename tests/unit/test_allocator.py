"""The simulated allocator: what PyTorch's takes from the device, by hand and by laws."""

import random
from itertools import pairwise

import pytest

from shardwise.core.allocator import PYTORCHS, AllocatorSettings, allocator_settings
from shardwise.core.errors import OptionError
from shardwise.predict.allocator import CachingAllocator, Piece

MIB, GIB = 2**20, 2**30
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def reserved(*sizes: int, settings: AllocatorSettings = PYTORCHS) -> int:
    """By storages of these bytes that all live."""
    allocator = CachingAllocator(settings)
    for n_bytes in sizes:
        allocator.allocate(n_bytes)
    return allocator.reserved_bytes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1,), 2 * MIB),
        ((MIB,) * 2, 2 * MIB),
        ((MIB,) * 3, 4 * MIB),
        ((MIB + 1,), 20 * MIB),  # 19 MiB more lie beside it
        ((9 * MIB,) * 2, 20 * MIB),
        ((9 * MIB,) * 3, 40 * MIB),
        ((10 * MIB,), 10 * MIB),
        ((11 * MIB,), 12 * MIB),
        ((GIB + 1,), GIB + 2 * MIB),
        ((1, MIB + 1), 22 * MIB),  # pools of their own
    ],
)
def test_segments_are_of_the_sizes_that_pytorch_asks_for(sizes: tuple[int, ...], expected: int) -> None:
    assert reserved(*sizes) == expected


def test_requests_are_rounded_to_512_bytes_or_to_parts_of_a_power_of_two() -> None:
    for n_bytes, divisions, expected in (
        (1, 1, 512),
        (513, 1, 1024),
        (1200, 4, 1536),  # too small for 4 parts of 512 bytes
        (1200 * 1024, 4, 1280 * 1024),  # PyTorch's own example: 1200 becomes 1280
        (1024 * 1024, 4, 1024 * 1024),
    ):
        allocator = CachingAllocator(AllocatorSettings(roundup_divisions=divisions))
        assert allocator.allocate(n_bytes).n_bytes == expected, (n_bytes, divisions)


def test_a_stream_reuses_its_own_blocks_alone() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB, stream=1))
    allocator.allocate(64 * MIB)
    assert allocator.reserved_bytes == 128 * MIB
    allocator.allocate(64 * MIB, stream=1)
    assert allocator.reserved_bytes == 128 * MIB


def test_the_smallest_block_that_fits_is_taken_and_split() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(100 * MIB), allocator.allocate(50 * MIB)
    allocator.free(large)
    allocator.free(small)
    taken = allocator.allocate(30 * MIB)
    assert taken.address == small.address
    assert taken.after is not None
    assert taken.after.n_bytes == 20 * MIB
    assert allocator.allocate(60 * MIB).address == large.address
    assert allocator.reserved_bytes == 150 * MIB


def test_a_rest_of_a_mebibyte_is_not_split_off_a_large_block() -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(50 * MIB)
    allocator.free(whole)
    assert allocator.allocate(49 * MIB).n_bytes == 50 * MIB
    assert allocator.active_bytes == 50 * MIB
    growing = CachingAllocator(EXPANDABLE)
    assert growing.allocate(49 * MIB).n_bytes == 49 * MIB


def test_what_is_freed_joins_its_neighbours_in_any_order() -> None:
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)):
        allocator = CachingAllocator()
        allocator.free(allocator.allocate(90 * MIB))
        parts = [allocator.allocate(30 * MIB) for _ in range(3)]
        for at in order:
            allocator.free(parts[at])
        allocator.allocate(90 * MIB)
        assert allocator.reserved_bytes == 90 * MIB, order


def test_slivers_between_what_lives_can_t_be_reused_and_pages_can() -> None:
    """Two blocks that live on between three that go: 120 MiB are free, and no 60 MiB of them lie together."""
    taken = {}
    for settings in (PYTORCHS, EXPANDABLE):
        allocator = CachingAllocator(settings)
        sizes = (40, 2, 40, 2, 40)
        parts = [allocator.allocate(size * MIB) for size in sizes]
        for piece in parts[::2]:
            allocator.free(piece)
        allocator.allocate(60 * MIB)
        taken[settings] = allocator.reserved_bytes
    assert taken[PYTORCHS] == (3 * 40 + 20 + 60) * MIB
    assert taken[EXPANDABLE] == 160 * MIB  # 124 are 7 pages; the last 40 become 60 by one page more
    assert taken[EXPANDABLE] % (20 * MIB) == 0


def test_blocks_above_the_largest_split_are_kept_for_large_requests() -> None:
    allocator = CachingAllocator(AllocatorSettings(max_split_bytes=100 * MIB))
    allocator.free(allocator.allocate(200 * MIB))
    allocator.allocate(50 * MIB)
    assert allocator.reserved_bytes == 250 * MIB
    allocator.allocate(190 * MIB)
    assert allocator.reserved_bytes == 250 * MIB


@pytest.mark.parametrize("settings", [PYTORCHS, EXPANDABLE])
def test_a_full_device_gets_back_what_is_free_as_a_whole(settings: AllocatorSettings) -> None:
    allocator = CachingAllocator(settings, capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB, stream=1))
    allocator.allocate(80 * MIB)
    assert (allocator.retries, allocator.overdrawn) == (1, 0)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.allocate(40 * MIB)
    assert allocator.overdrawn


def test_a_block_that_is_in_use_keeps_its_segment() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(20 * MIB)
    allocator.allocate(80 * MIB)
    assert allocator.overdrawn == 1
    growing = CachingAllocator(EXPANDABLE, capacity_bytes=100 * MIB)
    growing.free(growing.allocate(60 * MIB))
    growing.allocate(20 * MIB)
    growing.allocate(80 * MIB)  # 40 are there, and two pages more
    assert (growing.overdrawn, growing.reserved_bytes) == (0, 100 * MIB)


@pytest.mark.parametrize(
    "settings",
    [PYTORCHS, EXPANDABLE, AllocatorSettings(max_split_bytes=64 * MIB), AllocatorSettings(False, None, 8)],
)
@pytest.mark.parametrize("capacity", [None, 600 * MIB])
def test_whatever_comes_and_goes_pieces_never_overlap_and_nothing_is_lost(
    settings: AllocatorSettings, capacity: int | None
) -> None:
    """Over random storages on three streams: reserved covers what is in use, each byte of it once; once all
    is gone it is one block a segment, and the same storages take no more."""
    rng = random.Random(str((settings, capacity)))
    allocator = CachingAllocator(settings, capacity)
    live: list[tuple[Piece, int, int]] = []
    for _ in range(1500):
        if live and rng.random() < 0.48:
            piece, n_bytes, stream = live.pop(rng.randrange(len(live)))
            allocator.free(piece)
        else:
            n_bytes = rng.choice((1, 700, MIB, MIB + 1, 3 * MIB, 11 * MIB, 70 * MIB))
            stream = rng.randrange(3)
            live.append((allocator.allocate(n_bytes, stream), n_bytes, stream))
        assert allocator.reserved_bytes >= allocator.active_bytes >= sum(n_bytes for _, n_bytes, _ in live)
        assert allocator.active_bytes == sum(piece.n_bytes for piece, _, _ in live)
    spans = sorted((piece.address, piece.n_bytes) for piece, _, _ in live)
    assert all(a + n_bytes <= b for (a, n_bytes), (b, _) in pairwise(spans))
    before = allocator.reserved_bytes
    for piece, _, _ in live:
        allocator.free(piece)
    assert (allocator.active_bytes, allocator.reserved_bytes) == (0, before)
    for _, n_bytes, stream in sorted(live, key=lambda each: -each[1]):
        allocator.allocate(n_bytes, stream)
    if capacity is None:
        assert allocator.peak_reserved_bytes <= before * 1.1


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", PYTORCHS),
        ("expandable_segments:True", EXPANDABLE),
        ("expandable_segments:False, max_split_size_mb:512", AllocatorSettings(False, 512 * MIB)),
        ("roundup_power2_divisions:8", AllocatorSettings(False, None, 8)),
    ],
)
def test_settings_are_written_as_pytorch_takes_them(said: str, expected: AllocatorSettings) -> None:
    assert allocator_settings(said) == expected
    assert allocator_settings(str(expected)) == expected


@pytest.mark.parametrize(
    "said",
    [
        "expandable_segments",
        "expandable_segments:yes",
        "max_split_size_mb:20",
        "max_split_size_mb:" + "9" * 99,
        "backend:cudaMallocAsync",
        "roundup_power2_divisions:3",
        "garbage_collection_threshold:0.8",
    ],
)
def test_what_is_not_simulated_is_refused_in_one_line(said: str) -> None:
    with pytest.raises(OptionError, match="Use what PYTORCH_ALLOC_CONF takes, such as expandable") as refused:
        allocator_settings(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("first", [0, 1000])
def test_whole_pages_go_back_wherever_a_segment_begins(first: int) -> None:
    allocator = CachingAllocator(EXPANDABLE, 222 * MIB)
    if first:
        allocator.allocate(first)
    allocator.free(allocator.allocate(100 * MIB, 0))
    allocator.allocate(190 * MIB, 1)
    assert allocator.overdrawn == 0
    assert allocator.reserved_bytes == 200 * MIB + (20 * MIB if first else 0) - (18 * MIB if first else 0)
