"""Wire bytes by formula, and the laws between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.collective import CollectiveKind, Origin, wire_bytes
from shardwise.core.placement import Partial, Shard
from shardwise.core.rule import RuleRef

BYTES = st.integers(0, 10**15)
RANKS = st.integers(1, 100_000)
KINDS = st.sampled_from(CollectiveKind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (CollectiveKind.ALL_REDUCE, 150.0),
        (CollectiveKind.ALL_GATHER, 75.0),
        (CollectiveKind.REDUCE_SCATTER, 75.0),
        (CollectiveKind.ALL_TO_ALL, 75.0),
        (CollectiveKind.BROADCAST, 100.0),
    ],
)
def test_four_ranks_send_what_the_formula_says(kind: CollectiveKind, expected: float) -> None:
    assert wire_bytes(kind, 100, 4) == expected


def test_the_embedding_of_the_question_sends_eight_times_less_under_colwise() -> None:
    """Llama 3 8B, TP 8, batch 4, sequence 8192, fp32: a reduce-scatter of the whole, against an all-to-all of
    an eighth of it."""
    full_bytes = 4 * 8192 * 4096 * 4
    rowwise = wire_bytes(CollectiveKind.REDUCE_SCATTER, full_bytes, 8)
    colwise = wire_bytes(CollectiveKind.ALL_TO_ALL, full_bytes // 8, 8)
    assert rowwise == 7 / 8 * 536_870_912
    assert rowwise == 8 * colwise


@given(BYTES, RANKS)
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(full_bytes: int, ranks: int) -> None:
    parts = [
        wire_bytes(kind, full_bytes, ranks)
        for kind in (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER)
    ]
    assert wire_bytes(CollectiveKind.ALL_REDUCE, full_bytes, ranks) == pytest.approx(sum(parts))


@given(KINDS, BYTES)
def test_one_rank_sends_nothing(kind: CollectiveKind, full_bytes: int) -> None:
    assert wire_bytes(kind, full_bytes, 1) == 0


@given(KINDS, RANKS)
def test_no_bytes_send_nothing(kind: CollectiveKind, ranks: int) -> None:
    assert wire_bytes(kind, 0, ranks) == 0


@given(KINDS, BYTES, BYTES, RANKS)
def test_more_bytes_never_send_less(kind: CollectiveKind, one: int, other: int, ranks: int) -> None:
    less, more = sorted((one, other))
    assert wire_bytes(kind, less, ranks) <= wire_bytes(kind, more, ranks)


@given(KINDS, BYTES, RANKS, RANKS)
def test_more_ranks_never_send_less_each(kind: CollectiveKind, full_bytes: int, one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert wire_bytes(kind, full_bytes, fewer) <= wire_bytes(kind, full_bytes, more)


@given(KINDS, BYTES, RANKS)
def test_no_rank_sends_more_than_twice_the_tensor(kind: CollectiveKind, full_bytes: int, ranks: int) -> None:
    assert 0 <= wire_bytes(kind, full_bytes, ranks) <= 2 * full_bytes


def test_an_origin_says_who_asked_and_why() -> None:
    origin = Origin("tok_embeddings", RuleRef("tok_embeddings", "rowwise"), Partial(), Shard(1))
    assert str(origin) == 'tok_embeddings ("tok_embeddings" (rowwise)): Partial -> Shard(1)'
