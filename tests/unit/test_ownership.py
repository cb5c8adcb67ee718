"""Who owns which row, and the route of rows to the ranks that need them, for any vocabulary, number of ranks
and ids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.plan import Ownership
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.ownership import RowOwnership, route

RANKS = st.integers(1, 9)
OWNERSHIPS = st.builds(RowOwnership, st.integers(1, 300), RANKS, st.sampled_from(Ownership))


@st.composite
def batches(draw: st.DrawFn) -> tuple[RowOwnership, torch.Tensor]:
    """An ownership and ids [B, S] with S a multiple of the ranks; often few distinct ones."""
    ownership = draw(OWNERSHIPS)
    batch, part = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    highest = draw(st.integers(0, ownership.vocab_size - 1))
    n_ids = batch * part * ownership.axis_size
    ids = draw(st.lists(st.integers(0, highest), min_size=n_ids, max_size=n_ids))
    return ownership, torch.tensor(ids).view(batch, -1)


def table_of(ownership: RowOwnership) -> torch.Tensor:
    """[V, 2]: every row tells its id."""
    return torch.arange(ownership.vocab_size)[:, None] * torch.tensor([1, 1000])


@given(st.integers(0, 1000), st.integers(1, 64))
def test_chunks_are_cut_as_torch_cuts_them(size: int, parts: int) -> None:
    sizes = chunk_sizes(size, parts)
    assert len(sizes) == parts
    assert sum(sizes) == size
    assert sizes == sorted(sizes, reverse=True)
    torchs = [len(chunk) for chunk in torch.arange(size).chunk(parts)] if size else []
    assert [s for s in sizes if s] == [s for s in torchs if s]


@given(OWNERSHIPS)
def test_every_id_has_one_owner_and_one_row_there(ownership: RowOwnership) -> None:
    ids = torch.arange(ownership.vocab_size)
    owner, local = ownership.owner(ids), ownership.local(ids)
    places = set(zip(owner.tolist(), local.tolist(), strict=True))
    assert places == {
        (rank, row) for rank in range(ownership.axis_size) for row in range(ownership.rows_of(rank))
    }
    assert len(places) == ownership.vocab_size


@given(OWNERSHIPS)
def test_ranks_own_as_many_rows_as_their_chunks_have(ownership: RowOwnership) -> None:
    sizes = [len(ownership.ids_of(rank)) for rank in range(ownership.axis_size)]
    assert sizes == chunk_sizes(ownership.vocab_size, ownership.axis_size)
    assert sizes == [ownership.rows_of(rank) for rank in range(ownership.axis_size)]


@given(OWNERSHIPS)
def test_ids_of_is_the_inverse_of_owner_and_local(ownership: RowOwnership) -> None:
    for rank in range(ownership.axis_size):
        ids = ownership.ids_of(rank)
        assert (ownership.owner(ids) == rank).all()
        assert ownership.local(ids).tolist() == list(range(len(ids)))


@given(batches())
def test_shapes_are_kept(batch: tuple[RowOwnership, torch.Tensor]) -> None:
    ownership, ids_BS = batch
    assert ownership.owner(ids_BS).shape == ownership.local(ids_BS).shape == ids_BS.shape


@given(st.integers(1, 40), RANKS)
def test_interleaved_rows_are_dealt_round_robin_where_they_divide(rows: int, ranks: int) -> None:
    ownership = RowOwnership(rows * ranks, ranks, Ownership.INTERLEAVED)
    ids = torch.arange(rows * ranks)
    assert (ownership.owner(ids) == ids % ranks).all()
    assert (ownership.local(ids) == ids // ranks).all()


@given(st.integers(1, 300), RANKS)
def test_the_first_ids_of_an_interleaved_table_are_spread_evenly(vocab_size: int, ranks: int) -> None:
    """Frequent tokens have small ids in most tokenizers; contiguous ownership gives them all to one rank."""
    ownership = RowOwnership(vocab_size, ranks, Ownership.INTERLEAVED)
    smallest = min(ownership.rows_of(rank) for rank in range(ranks))
    first = torch.arange(smallest * ranks)
    assert torch.bincount(ownership.owner(first), minlength=ranks).tolist() == [smallest] * ranks


def test_a_rank_that_is_full_is_passed_over() -> None:
    ownership = RowOwnership(10, 4, Ownership.INTERLEAVED)
    assert [ownership.ids_of(rank).tolist() for rank in range(4)] == [[0, 4, 7], [1, 5, 8], [2, 6, 9], [3]]


def test_a_rank_may_own_nothing() -> None:
    for kind in Ownership:
        ownership = RowOwnership(5, 4, kind)
        assert [ownership.rows_of(rank) for rank in range(4)] == [2, 2, 1, 0]
        assert ownership.ids_of(3).tolist() == []


@given(batches())
def test_the_routes_of_all_ranks_deliver_every_token_its_row(
    batch: tuple[RowOwnership, torch.Tensor],
) -> None:
    ownership, ids_BS = batch
    n_ranks, table = ownership.axis_size, table_of(ownership)
    routes = [route(ids_BS, ownership, rank) for rank in range(n_ranks)]
    kept = [table[ownership.ids_of(rank)] for rank in range(n_ranks)]
    sent = [kept[rank][r.send_rows].split(r.send_splits) for rank, r in enumerate(routes)]
    for rank, own_ids in enumerate(ids_BS.chunk(n_ranks, 1)):
        received = torch.cat([sent[source][rank] for source in range(n_ranks)])
        assert (received[routes[rank].expand] == table[own_ids.reshape(-1)]).all()


@given(batches())
def test_what_all_ranks_send_is_what_they_receive(batch: tuple[RowOwnership, torch.Tensor]) -> None:
    ownership, ids_BS = batch
    ranks = range(ownership.axis_size)
    routes = [route(ids_BS, ownership, rank) for rank in ranks]
    for source in ranks:
        assert len(routes[source].send_rows) == sum(routes[source].send_splits)
        for destination in ranks:
            assert routes[source].send_splits[destination] == routes[destination].receive_splits[source]


@given(batches())
def test_each_distinct_row_goes_once_to_each_rank_that_needs_it(
    batch: tuple[RowOwnership, torch.Tensor],
) -> None:
    ownership, ids_BS = batch
    for rank in range(ownership.axis_size):
        r = route(ids_BS, ownership, rank)
        for part, rows in zip(
            ids_BS.chunk(ownership.axis_size, 1), r.send_rows.split(r.send_splits), strict=True
        ):
            needed = {
                id_ for id_ in part.flatten().tolist() if int(ownership.owner(torch.tensor(id_))) == rank
            }
            assert len(rows) == len(needed)
            assert set(ownership.ids_of(rank)[rows].tolist()) == needed


@given(batches())
def test_no_rank_is_sent_more_rows_than_it_has_tokens(batch: tuple[RowOwnership, torch.Tensor]) -> None:
    ownership, ids_BS = batch
    for rank in range(ownership.axis_size):
        r = route(ids_BS, ownership, rank)
        assert sum(r.receive_splits) <= ids_BS.numel() // ownership.axis_size
        assert r.rows_sent_to_others(rank) == sum(
            split for other, split in enumerate(r.send_splits) if other != rank
        )


def test_a_rank_that_owns_none_of_the_ids_sends_nothing() -> None:
    ids_BS = torch.tensor([[0, 1, 0, 1]])
    r = route(ids_BS, RowOwnership(10, 2), 1)
    assert (r.send_rows.tolist(), r.send_splits, r.receive_splits) == ([], (0, 0), (2, 0))


@pytest.mark.parametrize("kind", Ownership)
def test_one_rank_sends_nothing_to_others(kind: Ownership) -> None:
    r = route(torch.tensor([[4, 4, 2]]), RowOwnership(5, 1, kind), 0)
    assert r.rows_sent_to_others(0) == 0
    assert r.send_splits == r.receive_splits == (2,)
