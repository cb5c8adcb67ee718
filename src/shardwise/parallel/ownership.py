"""Which rank owns which row of a table, or which part of a weight in pieces, and where it keeps it; and the
route that rows take to the ranks that need them.

Pure functions of host-side ids: no collectives, no devices. t ranks, V rows.

contiguous: rank r owns the r-th chunk, as torch.chunk cuts V. interleaved: rows are dealt round-robin, id % t
where t divides V, with the same number of rows per rank as contiguous has (a rank that is full is passed
over), so that a DTensor's shard sizes hold. pieces: each rank has its chunk of each.

The route (for sequence parallelism: rank d needs the d-th part of every sequence) sends each distinct row
once to each rank that needs it. Formula of what rank r sends: H x sum over d != r of |distinct ids of part d
that r owns|.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from shardwise.core.held import parts_of
from shardwise.core.plan import Ownership
from shardwise.parallel.chunks import chunk_sizes
from shardwise.parallel.route import Route


class Order(Protocol):
    """Which indices of a dim of `size` each rank of an axis keeps, and in which order; each as many as
    torch.chunk gives it, so that a DTensor's shard sizes hold."""

    @property
    def size(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def axis_size(self) -> int: ...
    def ids_of(self, rank: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PieceOrder:
    """Of a dim that is several pieces laid one after the other: each rank keeps its chunk of each piece.
    Every piece must divide by the axis. parts: see core/held.py; where there are any, this is what a rank
    uses of what it has whole."""

    pieces: tuple[int, ...]
    axis_size: int
    dim: int = 0
    parts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return sum(self.pieces)

    def ids_of(self, rank: int) -> Tensor:
        """The indices that a rank keeps: ascending."""
        own = []
        for piece, count in zip(
            torch.arange(self.size).split(self.pieces), self.parts or (0,) * len(self.pieces), strict=True
        ):
            n_parts = parts_of(count, self.axis_size)
            own.append(piece.chunk(n_parts)[rank * n_parts // self.axis_size])
        return torch.cat(own)


@dataclass(frozen=True, slots=True)
class RowOwnership:
    """Owner and local row of every id of a table of `vocab_size` rows over `axis_size` ranks."""

    vocab_size: int
    axis_size: int
    kind: Ownership = Ownership.CONTIGUOUS

    @property
    def size(self) -> int:
        return self.vocab_size

    @property
    def dim(self) -> int:
        return 0

    def rows_of(self, rank: int) -> int:
        return chunk_sizes(self.vocab_size, self.axis_size)[rank]

    @property
    def _is_simple_deal(self) -> bool:
        return self.vocab_size % self.axis_size == 0

    def owner(self, ids: Tensor) -> Tensor:
        """Rank that owns each id; same shape."""
        if self.kind is Ownership.CONTIGUOUS:
            return ids // -(-self.vocab_size // self.axis_size)
        if self._is_simple_deal:
            return ids % self.axis_size
        return _beside(_deal(self.vocab_size, self.axis_size)[0], ids)[ids]

    def local(self, ids: Tensor) -> Tensor:
        """Row of each id at its owner; same shape."""
        if self.kind is Ownership.CONTIGUOUS:
            return ids % -(-self.vocab_size // self.axis_size)
        if self._is_simple_deal:
            return ids // self.axis_size
        return _beside(_deal(self.vocab_size, self.axis_size)[1], ids)[ids]

    def ids_of(self, rank: int) -> Tensor:
        """The ids that a rank owns, in the order of its rows: ascending."""
        ids = torch.arange(self.vocab_size)
        return ids[self.owner(ids) == rank]


def _beside(table: Tensor, ids: Tensor) -> Tensor:
    """A table where the ids are; on the host it is there already."""
    return table if table.device == ids.device else table.to(ids.device)


@lru_cache(maxsize=8)
def _deal(vocab_size: int, axis_size: int) -> tuple[Tensor, Tensor]:
    """(owner, local row) of every id, dealt round-robin to ranks that aren't full."""
    sizes = torch.tensor(chunk_sizes(vocab_size, axis_size))
    rows, ranks = torch.meshgrid(torch.arange(int(sizes.max())), torch.arange(axis_size), indexing="ij")
    free = rows < sizes
    return ranks[free], rows[free]


def route(ids_BS: Tensor, ownership: RowOwnership, rank: int) -> Route:
    """The route of one rank for real ids on the host; the sequence must be a multiple of the axis."""
    n_ranks = ownership.axis_size
    parts = ids_BS.unflatten(1, (n_ranks, -1)).movedim(1, 0).reshape(n_ranks, -1)
    send_rows, send_splits = [], []
    for destination in range(n_ranks):
        if destination == rank:
            distinct, expand, receive_splits = _receive(parts[rank], ownership)
        else:
            distinct = _distinct(parts[destination], ownership.vocab_size)
        own = distinct[ownership.owner(distinct) == rank]
        send_rows.append(ownership.local(own))
        send_splits.append(len(own))
    return Route(torch.cat(send_rows), tuple(send_splits), receive_splits, expand)


def _distinct(ids: Tensor, vocab_size: int) -> Tensor:
    """Sorted distinct ids, by a mark per row of the table: linear, where torch.unique sorts."""
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    seen[ids] = True
    return seen.nonzero().view(-1)


def _receive(ids: Tensor, ownership: RowOwnership) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(distinct ids, index of each token among the received rows, rows received per source)."""
    distinct = _distinct(ids, ownership.vocab_size)
    owners = ownership.owner(distinct)
    counts = torch.bincount(owners, minlength=ownership.axis_size)
    arrival = torch.empty_like(distinct)
    arrival[torch.argsort(owners, stable=True)] = torch.arange(len(distinct))
    position = torch.empty(ownership.vocab_size, dtype=torch.int64)
    position[distinct] = arrival
    return distinct, position[ids], tuple(counts.tolist())
