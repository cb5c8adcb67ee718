"""Fewer units than ranks: what some weights have alone (KV heads of keys and values) and others with more of
them inside (the query heads that share one). Ranks then share out both together: each has one KV head, as
its neighbours do, and its part of the query heads that go with it."""

from collections import defaultdict
from collections.abc import Iterator

from shardwise.dims.factors import Factor, flat, pieces, view
from shardwise.dims.record import Record


def has_few(record: Record, ranks: int) -> bool:
    """Whether there are any, the record left as it is."""
    return bool(_pairs(record, ranks))


def few_with_inner(record: Record, ranks: int) -> dict[Factor, Factor]:
    """Each such leaf, and what is right inside it that is cut too: a new leaf, of as many as make up the
    ranks, into which the record's is split."""
    found: dict[Factor, Factor] = {}
    for few, inside in _pairs(record, ranks).items():
        outer, _ = view([inside], [ranks // few.size, inside.size * few.size // ranks])
        if outer.is_leaf and outer not in found.values():
            found[few] = outer
    return found


def _pairs(record: Record, ranks: int) -> dict[Factor, Factor]:
    """Leaf -> what is right inside it in some parameters, and not at all in others."""
    places: defaultdict[Factor, list[tuple[Factor, ...]]] = defaultdict(list)
    for leaf, inside in _products(record):
        if 1 < leaf.size < ranks and ranks % leaf.size == 0:
            places[leaf].append(inside)
    found = {}
    for leaf, insides in places.items():
        first = dict.fromkeys(inside[0] for inside in insides if inside)
        some = [
            each
            for each in first
            if any(each not in inside for inside in insides)
            and all(each not in inside[1:] for inside in insides)
        ]
        if len(some) == 1 and some[0].is_leaf and some[0].size % (ranks // leaf.size) == 0:
            found[leaf] = some[0]
    return found


def _products(record: Record) -> Iterator[tuple[Factor, tuple[Factor, ...]]]:
    """Of every parameter's dim each leaf of its products, and what stands inside it, from there inwards."""
    for value in record.parameters.values():
        for dim in value.dims:
            for piece in pieces(dim):
                own = flat(piece)
                for at, leaf in enumerate(own):
                    if leaf.is_leaf:
                        yield leaf, tuple(own[at + 1 :])
