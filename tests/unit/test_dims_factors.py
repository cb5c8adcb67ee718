"""The algebra of dims against its meaning: every entry of a dim is written down as where it stands in each of
the dim's leaves. What the algebra says of views, slices, concatenations and ties must be so entry by entry,
and stay so whatever else is tied later."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.dims.factors import (
    ConflictError,
    Factor,
    Piece,
    concatenation,
    find,
    flat,
    is_partly,
    layout,
    leaves,
    local_size,
    narrow,
    pieces,
    product,
    unify,
    view,
)

Entry = tuple[tuple[int, int], ...]
"""(leaf, index in it), outer to inner."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 24)
MOST = 600


def entries(factor: Factor) -> list[Entry]:
    """Every entry of a dim, in order."""
    factor = find(factor)
    if factor.is_leaf:
        return [((id(factor), at),) if factor.size > 1 else () for at in range(factor.size)]
    if factor.is_sum:
        return [entry for part in factor.parts for entry in entries(part)]
    found: list[Entry] = [()]
    for part in factor.parts:
        own = entries(part)
        found = [outer + inner for outer in found for inner in own]
    return found


def entries_of(dims: list[Factor]) -> list[Entry]:
    """Every entry of a tensor, row by row."""
    found: list[Entry] = [()]
    for dim in dims:
        own = entries(dim)
        found = [outer + inner for outer in found for inner in own]
    return found


def owners(factor: Factor, leaf: Factor, ranks: int) -> list[int]:
    """The rank that has each entry where `leaf` is cut, -1 for all of them, from the entries."""
    found = []
    for entry in entries(factor):
        own = [at for which, at in entry if which == id(leaf)]
        if len(own) > 1:
            raise ConflictError("twice")
        found.append(own[0] // (leaf.size // ranks) if own else -1)
    return found


def owners_by_layout(factor: Factor, leaf: Factor, ranks: int) -> list[int]:
    found = []
    for piece in layout(factor, frozenset({leaf})):
        found += [at * ranks // piece.size if piece.is_cut else -1 for at in range(piece.size)]
    return found


@dataclass
class Told:
    """What was said to be equal: two tensors' dims, entry by entry from `start` of the second's."""

    these: list[Factor]
    those: list[Factor]
    start: int = 0

    def check(self) -> None:
        these = entries_of(self.these)
        assert entries_of(self.those)[self.start : self.start + len(these)] == these


@dataclass
class Forward:
    """Random ops on random dims, and what was said of them."""

    data: st.DataObject
    dims: list[Factor] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    n_conflicts: int = 0

    def run(self) -> None:
        self.dims = [
            Factor(n) for n in self.data.draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=4))
        ]
        steps = [self.view, self.narrow, self.concatenate, self.tie]
        for step in self.data.draw(st.lists(st.sampled_from(steps), min_size=1, max_size=8)):
            try:
                step()
            except ConflictError:
                self.n_conflicts += 1

    def one(self) -> Factor:
        return self.data.draw(st.sampled_from(self.dims))

    def view(self) -> None:
        dims = [self.one() for _ in range(self.data.draw(st.integers(1, 2)))]
        total = math.prod(dim.size for dim in dims)
        if not 0 < total <= MOST:
            return
        sizes, rest = [], total
        while rest > 1:
            sizes.append(self.data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
            rest //= sizes[-1]
        found = view(dims, sizes)
        assert [dim.size for dim in found] == sizes
        self.told.append(Told(found, dims))
        self.dims += found

    def narrow(self) -> None:
        dim = self.one()
        unit = self.data.draw(st.sampled_from([n for n in range(1, dim.size + 1) if dim.size % n == 0]))
        start = unit * self.data.draw(st.integers(0, dim.size // unit))
        stop = start + unit * self.data.draw(st.integers(0, (dim.size - start) // unit))
        found = narrow(dim, start, stop)
        assert found.size == stop - start
        self.told.append(Told([found], [dim], start))
        if found.size:
            self.dims.append(found)

    def concatenate(self) -> None:
        parts = [self.one() for _ in range(self.data.draw(st.integers(1, 3)))]
        if sum(part.size for part in parts) > MOST:
            return
        found, start = concatenation(parts), 0
        for part in parts:
            self.told.append(Told([part], [found], start))
            start += part.size
        self.dims.append(found)

    def tie(self) -> None:
        first = self.one()
        second = self.data.draw(st.sampled_from([dim for dim in self.dims if dim.size == first.size]))
        unify(first, second)
        self.told.append(Told([first], [second]))


@given(st.data())
def test_what_was_said_of_dims_is_so_for_each_entry_whatever_is_tied_later(data: st.DataObject) -> None:
    forward = Forward(data)
    forward.run()
    for each in forward.told:
        each.check()


@given(st.data(), st.sampled_from((2, 3, 4)))
def test_a_rank_has_the_entries_of_its_chunk_of_the_leaf_that_is_cut(data: st.DataObject, ranks: int) -> None:
    forward = Forward(data)
    forward.run()
    for dim in forward.dims:
        for leaf in set(leaves(dim)):
            if leaf.size % ranks:
                continue
            try:
                expected = owners(dim, leaf, ranks)
            except ConflictError:
                with pytest.raises(ConflictError, match="cut twice"):
                    layout(dim, frozenset({leaf}))
                continue
            assert owners_by_layout(dim, leaf, ranks) == expected
            for rank in range(ranks):
                own = sum(owner in (rank, -1) for owner in expected)
                assert local_size(dim, frozenset({leaf}), ranks) == own


@given(st.data())
def test_a_dim_keeps_its_size(data: st.DataObject) -> None:
    forward = Forward(data)
    forward.run()
    for dim in forward.dims:
        assert len(entries(dim)) == find(dim).size == dim.size
        assert math.prod(each.size for each in flat(dim)) == dim.size
        assert sum(each.size for each in pieces(dim)) == dim.size


@given(st.lists(st.sampled_from((2, 3, 4)), min_size=1, max_size=6), st.data())
def test_a_view_over_whole_factors_of_fresh_dims_is_never_a_conflict(
    sizes: list[int], data: st.DataObject
) -> None:
    def grouped() -> list[int]:
        found, rest = [], list(sizes)
        while rest:
            n = data.draw(st.integers(1, len(rest)))
            found.append(math.prod(rest[:n]))
            rest = rest[n:]
        return found

    dims = [Factor(n) for n in grouped()]
    wanted = grouped()
    found = view(dims, wanted)
    assert entries_of(found) == entries_of(dims)


@given(st.data())
def test_two_refinements_of_one_dim_by_the_same_factors_tie(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from((2, 3)), min_size=2, max_size=5))
    at = data.draw(st.integers(1, len(sizes)))
    fine, coarse = Factor(math.prod(sizes)), Factor(math.prod(sizes))
    view([fine], sizes)
    view([coarse], [math.prod(sizes[:at]), math.prod(sizes[at:])])
    unify(fine, coarse)
    assert entries(fine) == entries(coarse)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.data())
def test_a_fresh_dim_can_be_sliced_anywhere_and_put_together_again(
    sizes: list[int], data: st.DataObject
) -> None:
    dim, start, parts = Factor(sum(sizes)), 0, []
    for n in sizes:
        parts.append(narrow(dim, start, start + n))
        start += n
    again = concatenation(data.draw(st.permutations(parts)) if data.draw(st.booleans()) else parts)
    assert sorted(entries(again)) == sorted(entries(dim))


def test_heads_that_are_viewed_out_of_a_projection_are_one_leaf_outside_the_entries_of_a_head() -> None:
    rows = Factor(32)
    heads, width = view([rows], [4, 8])
    assert layout(rows, frozenset({find(heads)})) == [Piece(32, True)]
    assert layout(rows, frozenset({find(width)})) == [Piece(8, True)] * 4


def test_key_value_heads_that_serve_several_query_heads_are_cut_with_them() -> None:
    """32 query heads on 8 key heads: expand to [8, 4], view as 32, tie with the queries' heads."""
    queries, keys = Factor(32), Factor(8)
    shared = product([keys, Factor(4)])
    unify(queries, shared)
    assert layout(queries, frozenset({find(keys)})) == [Piece(32, True)]


def test_a_fused_projection_is_cut_in_each_of_its_pieces() -> None:
    fused = Factor(48)
    query, key, value = (narrow(fused, start, stop) for start, stop in ((0, 32), (32, 40), (40, 48)))
    heads, _ = view([query], [4, 8])
    for part in (key, value):
        units, _ = view([part], [4, 2])
        unify(heads, units)
    cut = frozenset({find(heads)})
    assert layout(fused, cut) == [Piece(32, True), Piece(8, True), Piece(8, True)]
    assert local_size(fused, cut, 2) == 24


def test_pieces_that_nobody_cuts_are_one() -> None:
    fused = Factor(24)
    first = narrow(fused, 0, 8)
    narrow(fused, 8, 12)
    assert layout(fused, frozenset({find(first)})) == [Piece(8, True), Piece(16, False)]


def test_a_view_across_pieces_gives_each_of_them_the_inner_factor() -> None:
    fused = Factor(48)
    narrow(fused, 0, 32)
    outer, inner = view([fused], [6, 8])
    assert [piece.size for piece in pieces(outer)] == [4, 2]
    assert layout(fused, frozenset({find(inner)})) == [Piece(8, True)] * 6


def test_a_slice_at_units_bounds_keeps_the_inner_factor() -> None:
    rows = Factor(32)
    heads, width = view([rows], [4, 8])
    part = narrow(rows, 8, 24)
    assert [each.size for each in flat(part)] == [2, 8]
    assert layout(part, frozenset({find(width)})) == [Piece(8, True)] * 2
    assert [piece.size for piece in pieces(heads)] == [1, 2, 1]


def test_nobody_can_cut_how_many_equal_pieces_there_are() -> None:
    """Tensors laid one after the other, counted by a view or by what they are tied to."""
    viewed = concatenation([Factor(6) for _ in range(4)])
    count, each = view([viewed], [2, 12])
    assert list(leaves(count)) == []
    assert entries_of([count, each]) == entries(viewed)
    tied, heads = concatenation([Factor(5), Factor(5)]), Factor(2)
    unify(product([heads, Factor(5)]), tied)
    assert list(leaves(heads)) == []


@pytest.mark.parametrize(
    ("why", "conflict"),
    [
        ("sizes differ", lambda: unify(Factor(6), Factor(4))),
        ("7 isn't a factor of 12", lambda: view([Factor(12)], [7])),
        ("a slice inside a unit", lambda: narrow(product([Factor(4), Factor(8)]), 4, 12)),
        ("4 x 6 and 6 x 4", lambda: unify(product([Factor(4), Factor(6)]), product([Factor(6), Factor(4)]))),
        ("pieces that no unit fits", lambda: view([concatenation([Factor(5), Factor(7)])], [6, 2])),
    ],
)
def test_what_can_t_be_one_is_a_conflict(why: str, conflict: Callable[[], object]) -> None:
    with pytest.raises(ConflictError):
        conflict()


def test_a_leaf_that_a_dim_has_in_two_factors_can_t_be_cut() -> None:
    side = Factor(4)
    square = view([side, side], [16])[0]
    with pytest.raises(ConflictError, match="would be cut twice"):
        layout(square, frozenset({find(side)}))


def test_few_heads_and_part_of_what_is_inside_them_are_shared_out_together() -> None:
    """2 key heads with 3 x 2 query heads each, over 4 ranks: each has one key head, 3 of its query heads."""
    keys, half, width = Factor(2), Factor(2), Factor(16)
    queries, cut = product([keys, half, Factor(3), width]), frozenset({keys, half})
    assert [piece.parts(4) for piece in layout(queries, cut)] == [4]
    assert [piece.parts(4) for piece in layout(product([keys, width]), cut)] == [2]
    assert local_size(queries, cut, 4) == 3 * 16
    assert local_size(product([keys, width]), cut, 4) == 16
    fused = concatenation([queries, product([keys, width])])
    assert is_partly(fused, cut)
    assert not is_partly(fused, frozenset({keys}))
    with pytest.raises(ConflictError):
        layout(product([keys, width, half]), cut)
    with pytest.raises(ConflictError):
        layout(product([keys, keys]), cut)


def test_a_sum_is_cut_partly_where_some_of_its_pieces_are() -> None:
    heads, shared, width = Factor(4), Factor(6), Factor(2)
    both = concatenation([product([heads, width]), shared])
    assert is_partly(both, frozenset({heads}))
    assert is_partly(product([Factor(3), both]), frozenset({width}))
    assert not is_partly(product([heads, width]), frozenset({heads}))
    assert not is_partly(both, frozenset({heads, shared}))
    assert not is_partly(both, frozenset())
