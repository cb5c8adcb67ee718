"""What each rank sees of a global batch: all of it once, however the mesh is made."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.core.batch_part import BatchPart, check_batch, coordinate, part_of_batch
from shardwise.core.errors import OptionError
from shardwise.core.mesh import NAMES, Mesh
from shardwise.step.portion import micro_batches_of

SMALL = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), min_size=1).map(
    lambda sizes: Mesh(tuple((name, sizes[name]) for name in NAMES if name in sizes))
)


def test_ranks_of_a_tensor_axis_see_the_same() -> None:
    parts = [part_of_batch(Mesh.parse("dp=2,tp=2"), rank) for rank in range(4)]
    assert parts == [BatchPart(0, 2), BatchPart(0, 2), BatchPart(1, 2), BatchPart(1, 2)]


def test_ranks_that_share_a_sequence_have_its_chunks_in_head_tail_pairs() -> None:
    parts = [part_of_batch(Mesh.parse("cp=2"), rank) for rank in range(2)]
    assert [part.chunks for part in parts] == [(0, 3), (1, 2)]
    assert [part.positions(8) for part in parts] == [(0, 1, 6, 7), (2, 3, 4, 5)]


def test_ranks_that_hold_other_experts_see_other_sequences() -> None:
    parts = [part_of_batch(Mesh.parse("dp=2,ep=2"), rank) for rank in range(4)]
    assert parts == [BatchPart(place, 4) for place in range(4)]


def test_stages_see_the_same_tokens() -> None:
    parts = [part_of_batch(Mesh.parse("pp=2,dp=2"), rank) for rank in range(4)]
    assert parts == 2 * [BatchPart(0, 2), BatchPart(1, 2)]


@given(SMALL, st.integers(1, 2), st.integers(1, 2))
def test_all_ranks_together_see_each_token_as_often_as_ranks_see_the_same(
    mesh: Mesh, share: int, micro_batches: int
) -> None:
    batch, seq = mesh.data_parallel * micro_batches * share, 2 * mesh.context
    check_batch(mesh, batch, seq, micro_batches)
    whole = torch.arange(batch * seq).view(batch, seq)
    seen = [
        part.flatten()
        for rank in range(mesh.world_size)
        for part in micro_batches_of(whole, part_of_batch(mesh, rank), micro_batches)
    ]
    times = mesh.world_size // (mesh.data_parallel * mesh.context)
    assert torch.equal(torch.cat(seen).bincount(minlength=batch * seq), torch.full((batch * seq,), times))


@given(SMALL)
def test_coordinates_number_the_ranks(mesh: Mesh) -> None:
    shape = [size for _, size in mesh.axes]
    ranks = torch.arange(mesh.world_size).view(shape)
    for rank in range(mesh.world_size):
        at = tuple(coordinate(mesh, rank, name) for name, _ in mesh.axes)
        assert int(ranks[at]) == rank
    assert math.prod(shape) == mesh.world_size


@pytest.mark.parametrize(
    ("mesh", "batch", "seq", "message"),
    [
        (
            "dp=2,ep=2",
            6,
            8,
            "--batch 6 can't be cut into 4 data-parallel parts of 1 micro-batches. Use a multiple of 4.",
        ),
        (
            "cp=4",
            1,
            36,
            "--seq 36 can't be cut into 8 chunks, two for each of 4 ranks that share a sequence. "
            "Use a multiple of 8.",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(mesh: str, batch: int, seq: int, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_batch(Mesh.parse(mesh), batch, seq)
    assert str(caught.value) == message
