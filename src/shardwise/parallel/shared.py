"""A weight in pieces of which several ranks use the same part: few KV heads, or what all heads share.

Each rank keeps its chunk of every piece, as of any weight that is cut in pieces (a DTensor has no placement
in which ranks hold the same part). For the time of a use those pieces are gathered, all of a weight at once,
and each rank takes the part that it uses. Going back, parts of the gradient are summed and each rank keeps
that of its own chunk: together 2 (n-1)/n x the bytes of the shared pieces, as one all-reduce of them would
send.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.core.held import Held, parts_of
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """How a rank gets what it uses of a weight that is held so. dim: that is cut, from the front."""

    held: Held
    dim: int
    site: Site

    def of(self, own: Tensor) -> Tensor:
        """The rank's chunks of all pieces -> what it uses."""
        axis, dim = self.site.axis, self.dim
        chunks = own.split([size // axis.size for size in self.held.pieces], dim)
        counts = [parts_of(count, axis.size) for count in self.held.parts]
        shared = [chunk for chunk, count in zip(chunks, counts, strict=True) if count < axis.size]
        if not shared:
            return own
        whole = collectives.all_gather(
            torch.cat(shared, dim) if len(shared) > 1 else shared[0],
            dim,
            axis,
            full_size=axis.size * sum(chunk.shape[dim] for chunk in shared),
            grad_placement=Partial(),
            origin=self.site.origin(Shard(dim), Replicate()),
        )
        of_ranks = whole.unflatten(dim, (axis.size, -1))
        gathered = iter(of_ranks.split([chunk.shape[dim] for chunk in shared], dim + 1))
        used = []
        for chunk, count in zip(chunks, counts, strict=True):
            if count == axis.size:
                used.append(chunk)
            else:
                piece = next(gathered).flatten(dim, dim + 1)
                used.append(piece.chunk(count, dim)[axis.rank * count // axis.size])
        return torch.cat(used, dim)
