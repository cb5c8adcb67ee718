"""Which of a rank's queries meet which keys: what is computed, and nothing else. Numbers, no tensors."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of this rank against the same keys of each of `sources`; local tokens both. is_diagonal: a
    query sees the keys up to its own."""

    sources: range
    queries: slice
    keys: slice
    is_diagonal: bool = False

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key that it may see, counting a diagonal's as half of its square."""
        n_queries: int = self.queries.stop - self.queries.start
        n_keys: int = self.keys.stop - self.keys.start
        return n_queries * n_keys * len(self.sources) // (2 if self.is_diagonal else 1)


def block_of(rank: int, source: int, length: int, *, is_causal: bool) -> Block:
    """What `rank` computes with the keys of `source`; each has `length` tokens, two chunks."""
    sources, whole, half = range(source, source + 1), slice(0, length), length // 2
    if not is_causal:
        return Block(sources, whole, whole)
    if source == rank:
        return Block(sources, whole, whole, is_diagonal=True)
    if source < rank:
        return Block(sources, whole, slice(0, half))
    return Block(sources, slice(half, length), whole)


def blocks_of(rank: int, ranks: int, length: int, *, is_causal: bool) -> Iterator[Block]:
    """All that `rank` computes, with equal blocks of several sources as one; its own square first, in which
    every query sees a key."""
    whole, half = slice(0, length), length // 2
    if not is_causal:
        yield Block(range(ranks), whole, whole)
        return
    yield block_of(rank, rank, length, is_causal=True)
    if rank > 0:
        yield Block(range(rank), whole, slice(0, half))
    if rank < ranks - 1:
        yield Block(range(rank + 1, ranks), slice(half, length), whole)
