"""Who writes what: of each part that several ranks hold, one of them, so that files are of about one size.

Ranks tell one another what they hold once; as long as that stays as it is, nobody asks again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shardwise.core.errors import CheckpointError
from shardwise.core.shown import shown
from shardwise.train.checkpoints.form import Entry, Part, dtype_name, is_covered, write_index
from shardwise.train.checkpoints.places import Place, sizes_of
from shardwise.train.checkpoints.state import Held


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """A part that a rank holds. item_bytes: of an element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: Place
    item_bytes: int

    @classmethod
    def of(cls, held: Held) -> "Claim":
        dtype = dtype_name(held.name, held.local.dtype)
        return cls(held.name, dtype, held.shape, held.place, held.local.element_size())

    @property
    def size(self) -> int:
        return math.prod(sizes_of(self.place)) * self.item_bytes


@dataclass(frozen=True, slots=True)
class Shares:
    """index: of the whole state, as the file has it; rank 0 writes it. own: what this rank writes."""

    index: bytes
    own: frozenset[str]


def shared_out(claims: Sequence[Sequence[Claim]], rank: int) -> Shares:
    """claims: of every rank, in order; the same answer on all. Raises CheckpointError where ranks hold a name
    in several ways, or not all of it."""
    holders: dict[str, dict[Place, list[int]]] = {}
    first: dict[str, Claim] = {}
    for holder, each in enumerate(claims):
        for claim in each:
            known = first.setdefault(claim.name, claim)
            if (known.dtype, known.shape) != (claim.dtype, claim.shape):
                raise CheckpointError(
                    f"checkpoint: {claim.name} is {known.dtype} {list(known.shape)} on one rank and "
                    f"{claim.dtype} {list(claim.shape)} on rank {holder}. Give all ranks the same model."
                )
            if 0 not in sizes_of(claim.place):
                holders.setdefault(claim.name, {}).setdefault(claim.place, []).append(holder)
    bytes_of = [0] * len(claims)
    entries, own = {}, set()
    for name, claim in first.items():
        parts = []
        for place, ranks in holders.get(name, {}).items():
            writer = min(ranks, key=lambda each: bytes_of[each])
            bytes_of[writer] += math.prod(sizes_of(place)) * claim.item_bytes
            parts.append(Part(writer, place))
            if writer == rank:
                own.add(name)
        if not is_covered(claim.shape, [part.place for part in parts]):
            raise CheckpointError(
                f"checkpoint: ranks together don't hold {shown(name)} {list(claim.shape)} once. Save on all "
                "ranks of the run."
            )
        entries[name] = Entry(claim.dtype, claim.shape, tuple(parts))
    # encoded once, for a large model's takes a second in which nothing else of the process runs
    return Shares(write_index(entries) if rank == 0 else b"", frozenset(own))
