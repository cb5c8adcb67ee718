"""Ranks that agree on a part of a store that earlier ranks have written to. Threads stand for ranks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore, Store

from shardwise.core.errors import RunError
from shardwise.launch.meeting import met


def start_of_ranks(store: Store, ranks: int) -> list[Store]:
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(lambda rank: met(store, rank, ranks, timeout_s=30), range(ranks)))


def test_each_start_has_a_part_of_its_own_whatever_dead_ranks_have_left() -> None:
    store = HashStore()
    store.set("shardwise/word/1", "of a rank that died before it was answered")
    parts = [start_of_ranks(store, ranks) for ranks in (3, 3, 2)]
    for number, part in enumerate(parts):
        part[0].set("address", str(number))
    assert [[each.get("address") for each in part] for part in parts] == [[b"0"] * 3, [b"1"] * 3, [b"2"] * 2]


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RunError, match=r"^rank 1 didn't come within 0\.2 s"):
        met(HashStore(), 0, 2, timeout_s=0.2)
