"""What training reads: sequences by one number, in an order that is another one each epoch and that
nobody holds."""

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.core.errors import OptionError, TextError
from shardwise.parallel import loss
from shardwise.text import batches
from shardwise.text.permutation import Permutation
from shardwise.text.samples import Samples
from shardwise.text.stream import TokenStream


def counted(tokens: int) -> TokenStream:
    """Each id its own place, so that a sequence says where it stood."""
    return TokenStream.of(
        np.arange(tokens, dtype=np.int32), vocab_size=tokens, source="counted", tokenizer="none"
    )


def order(n: int, seed: int = 0, number: int = 0) -> list[int]:
    return [int(value) for value in Permutation(n, seed, number).at(np.arange(n))]


def windows_read(samples: Samples, counts: Sequence[int], position: int = 0) -> list[int]:
    """The windows of batches of these sizes, one after the other from a position on."""
    read: list[int] = []
    for count in counts:
        read += (samples.at(position, count).ids_BS[:, 0] // samples.seq).tolist()
        position += count
    return read


@pytest.mark.parametrize("n", range(1, 70))
def test_every_place_of_a_small_permutation_is_taken_once(n: int) -> None:
    assert sorted(order(n)) == list(range(n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**80), number=st.integers(0, 2**70))
@settings(max_examples=60, deadline=None)
def test_a_permutation_of_any_size_and_seed_takes_every_place_once(n: int, seed: int, number: int) -> None:
    assert sorted(order(n, seed, number)) == list(range(n))


@given(n=st.integers(30, 3000), seed=st.integers(0, 2**64))
@settings(max_examples=30, deadline=None)
def test_each_epoch_and_each_seed_has_another_order(n: int, seed: int) -> None:
    orders = [order(n, seed, number) for number in range(3)] + [order(n, seed + 1, 0)]
    assert len({tuple(each) for each in orders}) == 4


@given(seed=st.integers(0, 2**64), start=st.integers(0, 10**18 - 500))
@settings(max_examples=30, deadline=None)
def test_places_of_a_permutation_too_large_to_hold_are_found_alone(seed: int, start: int) -> None:
    there = Permutation(10**18, seed, 1)
    many = there.at(start + np.arange(500))
    assert many.min() >= 0
    assert many.max() < 10**18
    assert np.unique(many).size == 500
    assert there.at(np.array([start + 7])).item() == many[7]


@pytest.mark.parametrize("n", [1024, 4097, 40_000])
@pytest.mark.parametrize("seed", range(4))
def test_where_a_window_comes_tells_nothing_of_where_it_stands(n: int, seed: int) -> None:
    """Pearson's chi-square of 16 parts of the places with 16 parts of the values: of a random permutation
    it has 15 x 15 degrees of freedom, so a mean of 225 and a deviation of sqrt(450). Neighbours are n/3
    apart."""
    values = np.array(order(n, seed))
    cells = np.zeros((16, 16))
    np.add.at(cells, (np.arange(n) * 16 // n, values * 16 // n), 1)
    expected = np.outer(cells.sum(1), cells.sum(0)) / n
    chi_square = ((cells - expected) ** 2 / expected).sum()
    assert abs(chi_square - 225) < 5 * 450**0.5
    apart = np.abs(np.diff(values))
    assert abs(apart.mean() - n / 3) < 5 * apart.std() / n**0.5
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 5 / n**0.5


def test_a_permutation_is_the_same_wherever_it_is_worked_out() -> None:
    assert order(12, seed=5, number=3) == [9, 10, 0, 2, 7, 3, 1, 4, 5, 11, 8, 6]


def test_an_epoch_has_every_window_once_and_labels_follow_their_ids() -> None:
    samples = Samples.of(counted(10 * 7 + 4), seq=7, seed=3)
    assert (samples.windows, samples.tokens) == (10, 74)
    batch = samples.at(0, 10)
    assert batch.ids_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert torch.equal(batch.labels_BS, batch.ids_BS + 1)
    assert torch.equal(batch.ids_BS - batch.ids_BS[:, :1], torch.arange(7).expand(10, 7))
    assert sorted(windows_read(samples, [10])) == list(range(10))


def test_each_of_many_epochs_reads_all_and_a_batch_may_cross_their_ends() -> None:
    samples = Samples.of(counted(11 * 3 + 1), seq=3, seed=1)
    read = windows_read(samples, [4] * 22)
    epochs = [read[start : start + 11] for start in range(0, 88, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert all(before != after for before, after in pairwise(epochs))
    assert windows_read(samples, [88]) == read


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=20), position=st.integers(0, 10**12))
@settings(max_examples=50, deadline=None)
def test_batches_of_any_sizes_read_the_same_sequences(counts: list[int], position: int) -> None:
    samples = Samples.of(counted(23 * 5 + 1), seq=5, seed=2, held_out=3)
    assert windows_read(samples, counts, position) == windows_read(samples, [sum(counts)], position)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_that_read_their_parts_read_the_whole_with_nothing_twice(ranks: int) -> None:
    """Twelve sequences a step; from the third step on six, as after a resume with another batch."""
    samples = Samples.of(counted(50 * 4 + 1), seq=4, seed=9)
    read, position = [], 0
    for batch in (12, 12, 24, 12, 12, 12, 12, 12, 12):
        size = batch // ranks
        for rank in range(ranks):
            read += windows_read(samples, [size], position + rank * size)
        position += batch
    assert read == windows_read(samples, [position])
    assert sorted(read[:50]) == sorted(read[50:100]) == list(range(50))


def test_held_out_windows_are_the_last_ones_and_never_trained_on() -> None:
    samples = Samples.of(counted(20 * 3 + 2), seq=3, seed=4, held_out=5)
    assert (samples.windows, samples.held_out) == (15, 5)
    assert sorted(windows_read(samples, [15])) == list(range(15))
    held = samples.held_out_at(0, 5)
    assert (held.ids_BS[:, 0] // 3).tolist() == list(range(15, 20))
    assert torch.equal(held.labels_BS, held.ids_BS + 1)
    assert torch.equal(samples.held_out_at(3, 2).ids_BS, held.ids_BS[3:])


@pytest.mark.parametrize("held_out", [0, 3])
def test_beyond_the_last_held_out_sequence_nothing_is_asked(held_out: int) -> None:
    samples = Samples.of(counted(101), seq=4, held_out=held_out)
    held = samples.held_out_at(0, 8)
    assert held.ids_BS.shape == held.labels_BS.shape == (8, 4)
    assert (held.labels_BS[held_out:] == -100).all()
    assert (held.labels_BS[:held_out] != -100).all()
    assert (held.ids_BS[held_out:] == 0).all()


def test_what_the_data_ignores_the_losses_ignore() -> None:
    assert batches.IGNORED == loss.IGNORED


def test_reading_far_into_training_takes_no_memory_for_what_lies_before() -> None:
    samples = Samples.of(counted(100_001), seq=1, seed=0)
    samples.at(0, 4)
    tracemalloc.start()
    samples.at(10**15, 64)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_the_digest_is_of_the_tokens_alone() -> None:
    assert Samples.of(counted(100), 4).digest == Samples.of(counted(100), 8, seed=1, held_out=2).digest
    assert Samples.of(counted(100), 4).digest != Samples.of(counted(101), 4).digest


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"seq": 0}, OptionError, "seq: 0. Use 1 or more."),
        ({"seq": 4, "held_out": -1}, OptionError, "held-out sequences: -1. Use 0 or more."),
        ({"seq": 4, "seed": -1}, OptionError, "seed: -1. Use 0 or more."),
        (
            {"seq": 100},
            TextError,
            "counted has 100 tokens, and 1 sequence of 100 needs 101. Give more text, or use shorter "
            "sequences.",
        ),
        (
            {"seq": 10, "held_out": 9},
            TextError,
            "counted has 100 tokens, and 10 sequences of 10, 9 of them held out, need 101. Give more text, "
            "use shorter sequences, or hold out fewer.",
        ),
    ],
)
def test_numbers_and_texts_that_give_no_sequence_are_refused(
    asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        Samples.of(counted(100), **asked)
    assert str(raised.value) == message
