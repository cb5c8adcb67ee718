"""Digests of tensors: equal for equal bits, and for nothing else that happens in practice. On real ranks:
test_styles.py and test_watch.py."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.verify.ranks import digest
from shardwise.watch.digest import COLUMNS

VALUES = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@given(VALUES)
def test_equal_tensors_have_equal_digests(values: list[float]) -> None:
    assert digest(torch.tensor(values)) == digest(torch.tensor(values))


@given(VALUES, st.randoms())
def test_permuted_values_have_another_digest(values: list[float], random: Random) -> None:
    permuted = list(values)
    random.shuffle(permuted)
    one, other = torch.tensor(values), torch.tensor(permuted)
    assert (digest(one) == digest(other)) == bool((one.view(torch.int32) == other.view(torch.int32)).all())


@given(VALUES, st.integers(0, 49), st.integers(0, 31))
def test_one_changed_bit_changes_the_digest(values: list[float], place: int, bit: int) -> None:
    one = torch.tensor(values)
    other = one.clone()
    other.view(torch.int32)[place % len(values)] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert digest(one) != digest(other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_a_digest_that_depends_on_the_order(dtype: torch.dtype) -> None:
    one = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    assert digest(one) == digest(one.clone())
    assert digest(one) != digest(one.flip(0))


def test_values_moved_symmetrically_have_another_digest() -> None:
    assert digest(torch.tensor([1.0, 0, 0, 0, 0, 1.0])) != digest(torch.tensor([0, 0, 1.0, 1.0, 0, 0]))


def test_a_view_has_the_digest_of_its_values() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert digest(x.T) == digest(x.T.contiguous())
    assert digest(x.T) != digest(x)


def test_no_values_have_a_digest() -> None:
    assert digest(torch.empty(0)) == 0


LONG = 2 * COLUMNS + 5


@pytest.mark.parametrize("place", [0, COLUMNS - 1, COLUMNS, 2 * COLUMNS, LONG - 1])
@pytest.mark.parametrize("bit", [1, 1 << 30, -(1 << 31)])
def test_one_changed_bit_changes_the_digest_of_a_long_tensor(place: int, bit: int) -> None:
    one = torch.zeros(LONG)
    other = one.clone()
    other.view(torch.int32)[place] ^= bit
    assert digest(one) != digest(other)


@pytest.mark.parametrize(("place", "other"), [(0, 1), (3, COLUMNS + 3), (7, COLUMNS), (1, LONG - 1)])
def test_two_numbers_of_a_long_tensor_that_change_places_change_the_digest(place: int, other: int) -> None:
    one = torch.zeros(LONG)
    one[place], one[other] = 1.0, -1.0
    assert digest(one) != digest(-one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_a_changed_bit_of_a_short_dtype_that_does_not_fill_words_changes_the_digest(
    dtype: torch.dtype,
) -> None:
    one = torch.ones(7).to(dtype)
    other = one.clone()
    other.view(torch.uint8)[-1] ^= 1
    assert digest(one) != digest(other)
    assert digest(one[1:]) == digest(one[1:].clone())  # wherever in memory it begins
