"""How ranks' pieces relate to the whole: each relation made on purpose, and told from the others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.verify.blocks import Block
from shardwise.verify.relation import Relation, relate

WHOLE = torch.arange(1.0, 49.0, dtype=torch.float64).reshape(12, 4)
NOISE = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(12, 4)


def found(*pieces: Tensor | None) -> tuple[Relation, int | None, float | None]:
    related = relate(pieces, WHOLE, tolerance=1e-10)
    return related.relation, related.dim, related.factor


def test_equal_on_all_ranks_is_the_whole() -> None:
    assert found(WHOLE, WHOLE.clone(), WHOLE)[0] is Relation.WHOLE


def test_chunks_are_sharded_along_their_dim() -> None:
    assert found(*WHOLE.chunk(2, 0))[:2] == (Relation.SHARDED, 0)
    assert found(*WHOLE.chunk(2, 1))[:2] == (Relation.SHARDED, 1)


def test_uneven_chunks_are_sharded_too() -> None:
    assert found(*WHOLE.split([5, 5, 2], 0))[:2] == (Relation.SHARDED, 0)


def test_what_sums_to_the_whole_is_parts() -> None:
    assert found(WHOLE / 3 + NOISE, WHOLE / 3, WHOLE / 3 - NOISE) == (Relation.PARTS, None, None)


def test_parts_that_sum_to_a_multiple_say_how_many_times() -> None:
    relation, _, factor = found(WHOLE + NOISE, WHOLE - NOISE)
    assert relation is Relation.PARTS
    assert factor == pytest.approx(2)


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 8.0])
def test_equal_multiples_are_a_multiple_though_halves_would_sum_to_the_whole(factor: float) -> None:
    relation, _, told = found(factor * WHOLE, factor * WHOLE)
    assert relation is Relation.MULTIPLE
    assert told == pytest.approx(factor)


def test_multiples_of_chunks_are_a_multiple() -> None:
    relation, dim, factor = found(*(2 * chunk for chunk in WHOLE.chunk(2, 0)))
    assert (relation, dim) == (Relation.MULTIPLE, 0)
    assert factor == pytest.approx(2)


def test_a_chunk_of_another_rank_is_shifted() -> None:
    first, second, third = WHOLE.chunk(3, 0)
    assert found(second, third, first) == (Relation.SHIFTED, 0, 1.0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_every_rank_holds_for_itself_and_someone_added_up_is_told(ranks: int) -> None:
    total = sum(WHOLE.chunk(ranks, 0))
    assert isinstance(total, torch.Tensor)
    assert found(*[total] * ranks) == (Relation.ADDED, 0, None)


@pytest.mark.parametrize("several", [2, 3])
def test_weights_that_lie_in_one_and_are_each_cut_by_themselves(several: int) -> None:
    parts = [part.chunk(2, 0) for part in WHOLE.chunk(several, 0)]
    assert found(*(torch.cat([part[rank] for part in parts]) for rank in range(2))) == (
        Relation.ONE_OF_SEVERAL,
        0,
        float(several),
    )


def test_rows_that_are_parts_beside_rows_that_are_whole_are_blocks() -> None:
    """As of a projection that gives a latent, whose gradient is summed, and a key that all heads share."""
    parts = WHOLE / 2 + NOISE, WHOLE / 2 - NOISE
    pieces = [torch.cat([WHOLE[:8], part[8:]]) for part in parts]
    related = relate(pieces, WHOLE, tolerance=1e-10)
    assert (related.relation, related.dim) == (Relation.BLOCKS, 0)
    assert related.blocks == (Block(0, 8), Block(8, 12, is_part=True))
    columns = [piece.T.contiguous() for piece in pieces]
    assert relate(columns, WHOLE.T, tolerance=1e-10).dim == 1


def test_rows_that_are_a_multiple_beside_rows_that_are_whole_are_blocks() -> None:
    piece = torch.cat([WHOLE[:3], 2 * WHOLE[3:5], WHOLE[5:]])
    related = relate([piece, piece], WHOLE, tolerance=1e-10)
    assert related.relation is Relation.BLOCKS
    assert [(block.start, block.stop) for block in related.blocks] == [(0, 3), (3, 5), (5, 12)]
    assert related.blocks[1].factor == pytest.approx(2)


def test_rows_of_a_shard_that_get_nothing_are_blocks_of_the_whole() -> None:
    pieces = list(WHOLE.chunk(2))
    pieces[1] = pieces[1].clone()
    pieces[1][1] = 0.0
    found = relate(pieces, WHOLE, tolerance=1e-9)
    assert (found.relation, found.dim) == (Relation.BLOCKS, 0)
    silent = len(pieces[0]) + 1
    wrong = [block for block in found.blocks if not block.is_whole]
    assert wrong == [Block(silent, silent + 1, factor=0.0)]


def test_rows_of_several_multiples_are_no_blocks() -> None:
    piece = torch.cat([WHOLE[:3], 2 * WHOLE[3:5], 3 * WHOLE[5:]])
    assert relate([piece, piece], WHOLE, tolerance=1e-10).relation is Relation.OTHER


def test_all_slices_in_an_order_of_their_own_are_reordered_and_right() -> None:
    order = torch.tensor([1, 0, 5, 2, 7, 8, 3, 4, 6, 11, 9, 10])
    related = relate(WHOLE[order].chunk(2), WHOLE, tolerance=1e-10)
    assert (related.relation, related.dim, related.is_right) == (Relation.REORDERED, 0, True)
    twice = torch.cat([WHOLE[:6], WHOLE[:5], WHOLE[11:]])[order]
    assert relate(twice.chunk(2), WHOLE, tolerance=1e-10).relation is Relation.OTHER


def test_zero_missing_unequal_and_other() -> None:
    assert found(0 * WHOLE, 0 * WHOLE)[0] is Relation.ZERO
    assert found(WHOLE, None)[0] is Relation.MISSING
    assert found(WHOLE + NOISE, WHOLE)[0] is Relation.UNEQUAL
    assert found(WHOLE + NOISE, WHOLE + NOISE)[0] is Relation.OTHER
    assert found(WHOLE[:, :1], WHOLE[:5])[0] is Relation.OTHER


def test_a_number_that_is_none_is_never_right() -> None:
    broken = WHOLE.clone()
    broken[0, 0] = torch.nan
    assert not relate([WHOLE, broken], WHOLE, tolerance=1e-10).is_right
    assert not relate([broken, broken], WHOLE, tolerance=1e-10).is_right


def test_an_error_is_relative_to_the_whole_and_the_largest_of_the_ranks() -> None:
    related = relate([WHOLE, WHOLE + 0.5 * WHOLE.norm() * NOISE / NOISE.norm()], WHOLE, tolerance=1e-10)
    assert related.error == pytest.approx(0.5)


@given(st.integers(2, 4), st.integers(0, 1), st.floats(1e-14, 1e-11))
def test_rounding_changes_no_relation(n: int, dim: int, size: float) -> None:
    off = size * NOISE
    chunks = [chunk + part for chunk, part in zip(WHOLE.chunk(n, dim), off.chunk(n, dim), strict=True)]
    assert found(*chunks)[:2] == (Relation.SHARDED, dim)
    assert found(*([WHOLE + off] * n))[0] is Relation.WHOLE
