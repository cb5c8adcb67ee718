"""Held: how the ranks of a tensor-parallel axis hold one parameter, as a plan may say it: cut or whole, in
pieces or not, and what each rank's gradient of it is."""

import re
from dataclasses import dataclass
from typing import Self

from shardwise.core.placement import Partial, Placement, Replicate, Shard

ALLOWED = '"shard(DIM)", "shard(DIM: SIZE+SIZE)" in pieces, "replicate", "replicate, gradient partial"'


@dataclass(frozen=True, slots=True)
class Held:
    """placement: Shard or Replicate. pieces: the sizes of what lies one after the other in the dim that is
    cut, where that is several things (query, key and value in one weight): each rank has its chunk of each.
    gradient: Partial where each rank computes a part of a whole parameter's gradient, which is then summed.

    Raises ValueError for what can't be.
    """

    placement: Shard | Replicate
    pieces: tuple[int, ...] = ()
    gradient: Partial | None = None

    def __post_init__(self) -> None:
        if self.pieces and not isinstance(self.placement, Shard):
            raise ValueError("a parameter that is whole has no pieces.")
        if self.gradient is not None and not isinstance(self.placement, Replicate):
            raise ValueError("the gradient of what is cut is cut alike: leave it out.")
        check_pieces(self.pieces)

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"shard(0: 3072+1024+1024)"` -> Held. Raises ValueError with what is allowed."""
        plain = " ".join(text.lower().split())
        cut = re.fullmatch(r"shard\( ?(-?\d{1,2}) ?(?:: ?([\d+ ]+))?\)", plain)
        if cut:
            return cls(Shard(int(cut[1])), parse_pieces(cut[2]) if cut[2] else ())
        whole = re.fullmatch(r"replicate ?(, ?gradient partial)?", plain)
        if whole:
            return cls(Replicate(), gradient=Partial() if whole[1] else None)
        raise ValueError(f'"{text}" says no way to hold a parameter. Allowed: {ALLOWED}.')

    @property
    def gradient_placement(self) -> Placement:
        """What one rank's gradient of it is."""
        return self.gradient or self.placement

    def __str__(self) -> str:
        """The inverse of parse()."""
        match self.placement:
            case Shard(dim):
                return f"shard({dim}: {format_pieces(self.pieces)})" if self.pieces else f"shard({dim})"
            case Replicate():
                return "replicate" if self.gradient is None else "replicate, gradient partial"


def parse_pieces(text: str) -> tuple[int, ...]:
    """`"3072+1024+1024"` -> the sizes. Raises ValueError."""
    if not re.fullmatch(r" ?\d{1,15} ?(\+ ?\d{1,15} ?)+", text):
        raise ValueError(f'"{text}" is no list of pieces. Write sizes such as "3072+1024+1024".')
    pieces = tuple(map(int, text.split("+")))
    check_pieces(pieces)
    return pieces


def format_pieces(pieces: tuple[int, ...]) -> str:
    """The inverse of parse_pieces."""
    return "+".join(map(str, pieces))


def check_pieces(pieces: tuple[int, ...]) -> None:
    """Raises ValueError for sizes that are no pieces of a dim; none at all are fine."""
    if pieces and (len(pieces) < 2 or min(pieces) < 1):
        raise ValueError(f"pieces are {format_pieces(pieces)}. Give two sizes or more, each at least 1.")
