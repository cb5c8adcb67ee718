"""What a sentinel says of what differs: word for word, for people act on it. Found on real ranks:
tests/distributed/test_watch.py."""

import pytest
import torch

from shardwise.core.drift import Drift, Held
from shardwise.watch.alike import Alike, Grid
from shardwise.watch.exchange import _joined, _Told, first_difference

GRID = Grid(("dp", "tp"), (2, 3), (0, 1, 2, 3, 4, 5), rank=4)
ALL = Alike(("dp", "tp"), (2, 3), (0, 1, 2, 3, 4, 5))


def told(held: Held, subject: str, *digests: int) -> dict[int, _Told]:
    return {rank: _Told(held, subject, ALL, digest, True) for rank, digest in enumerate(digests)}


def found(*items: dict[int, _Told]) -> Drift:
    drift = first_difference(7, {rank: [item[rank] for item in items] for rank in range(6)})
    assert drift is not None
    return drift


@pytest.mark.parametrize(
    ("axes", "members"), [(["tp"], (3, 4, 5)), (["dp"], (1, 4)), (["dp", "tp"], (0, 1, 2, 3, 4, 5))]
)
def test_ranks_along_axes_differ_in_no_other(axes: list[str], members: tuple[int, ...]) -> None:
    along = GRID.along(axes)
    assert along is not None
    assert along.members == members


def test_along_no_axis_a_rank_is_alone() -> None:
    assert GRID.along([]) is None


@pytest.mark.parametrize(
    ("values", "axes"),
    [
        ([1, 1, 1, 2, 2, 2], ("dp",)),
        ([1, 2, 3, 1, 2, 3], ("tp",)),
        ([1, 1, 1, 1, 1, 2], ("dp", "tp")),
        ([1] * 6, ()),
    ],
)
def test_values_differ_along_axes_whose_neighbours_do(values: list[int], axes: tuple[str, ...]) -> None:
    assert ALL.differing(values) == axes


def test_the_input_that_differs_is_told_before_weights_that_do() -> None:
    drift = found(
        told(Held.WEIGHT, "norm.weight", 1, 1, 1, 2, 2, 2), told(Held.INPUT, "ids", 1, 2, 3, 1, 2, 3)
    )
    assert (drift.held, drift.subject, drift.axes, drift.more) == (Held.INPUT, "ids", ("tp",), 1)


def test_of_weights_that_differ_the_models_first_is_told() -> None:
    drift = found(
        told(Held.WEIGHT, "same", 1, 1, 1, 1, 1, 1),
        told(Held.WEIGHT, "first", 1, 1, 1, 1, 1, 2),
        told(Held.WEIGHT, "second", 1, 1, 1, 1, 1, 2),
    )
    assert str(drift) == (
        "step 7: weight first isn't the same on all ranks along dp and tp: rank 5 against ranks 0, 1, 2, 3, "
        "4, and 1 more. Look for a gradient that isn't summed over dp and tp, an optimizer that isn't the "
        "same there, or a faulty device, where one rank alone differs."
    )


def test_where_nothing_differs_nothing_is_told() -> None:
    assert first_difference(1, {rank: [told(Held.INPUT, "ids", *[1] * 6)[rank]] for rank in range(6)}) is None


def test_what_a_rank_lacks_differs() -> None:
    items = told(Held.WEIGHT, "norm.weight", *[1] * 6)
    drift = first_difference(1, {rank: [items[rank]] if rank else [] for rank in range(6)})
    assert drift is not None
    assert drift.ranks == ((1, 2, 3, 4, 5), (0,))


@pytest.mark.parametrize(
    ("drift", "sentence"),
    [
        (
            Drift(1, Held.INPUT, "0", ("tp",), ((0,), (1,))),
            "step 1: input 0 isn't the same on all ranks along tp: rank 0 against rank 1. Give the ranks "
            "along "
            "tp the same batch: which part a rank reads is said by its place on the mesh's other axes; or "
            "name "
            "the axes whose ranks see the same in same_input=.",
        ),
        (
            Drift(1, Held.RANDOM, "", ("tp",), ((0,), (1,), (2,)), more=2),
            "step 1: random state isn't the same on all ranks along tp: no two hold the same, and 2 more. "
            "Seed "
            "the ranks along tp alike, or dropout takes other elements of what they hold alike; random=False "
            "leaves this out.",
        ),
        (
            Drift(1, Held.WEIGHT, "head.weight", (), ((0, 1), (2, 3)), is_first=True),
            "step 1: weight head.weight isn't the same on all ranks: ranks 0, 1 against ranks 2, 3. Build it "
            "from one seed on all ranks, or load one checkpoint, before it is sharded. If its ranks hold "
            "parts "
            "of their own, say so with replicated=, or make it a DTensor.",
        ),
    ],
)
def test_a_drift_says_what_where_and_what_to_do(drift: Drift, sentence: str) -> None:
    assert str(drift) == sentence


def test_many_ranks_are_counted() -> None:
    drift = Drift(1, Held.WEIGHT, "w", ("dp",), (tuple(range(31)), (31,)), is_placed=True, is_first=True)
    assert "rank 31 against ranks 0, 1, 2, 3, 4, 5, 6, 7 and 23 more." in str(drift)


def test_a_rank_that_is_not_on_the_mesh_is_alone() -> None:
    assert Grid(("tp",), (2,), (0, 1), rank=5).along(["tp"]) is None


@pytest.mark.parametrize(
    ("sets", "together"),
    [
        ([{0, 1}, {2, 3}], [[0, 1], [2, 3]]),
        ([{0, 1}, {2, 3}, {1, 3}], [[0, 1, 2, 3]]),
        ([{4, 5}, {0, 2}, {2, 4}, {1, 3}], [[0, 2, 4, 5], [1, 3]]),
    ],
)
def test_ranks_that_hold_something_alike_tell_each_other_and_no_others(
    sets: list[set[int]], together: list[list[int]]
) -> None:
    assert _joined(sets) == together


def test_a_digest_stays_where_its_tensor_is() -> None:
    from shardwise.watch.digest import digest

    assert digest(torch.ones(3)).shape == ()
