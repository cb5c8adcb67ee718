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
    parts: into how many parts each piece is cut for its use, where that is fewer than there are ranks, so
    that neighbouring ranks use the same one; 0 is one for each rank. gradient: Partial where each rank
    computes a part of a whole parameter's gradient, which is then summed.

    Raises ValueError for what can't be.
    """

    placement: Shard | Replicate
    pieces: tuple[int, ...] = ()
    gradient: Partial | None = None
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.pieces and not isinstance(self.placement, Shard):
            raise ValueError("a parameter that is whole has no pieces.")
        if self.gradient is not None and not isinstance(self.placement, Replicate):
            raise ValueError("the gradient of what is cut is cut alike: leave it out.")
        check_pieces(self.pieces, self.parts)

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"shard(0: 3072+1024+1024)"` -> Held. Raises ValueError with what is allowed."""
        plain = " ".join(text.lower().split())
        cut = re.fullmatch(r"shard\( ?(-?\d{1,2}) ?(?:: ?([\d+/ ]+))?\)", plain)
        if cut:
            pieces, parts = parse_pieces(cut[2]) if cut[2] else ((), ())
            return cls(Shard(int(cut[1])), pieces, parts=parts)
        whole = re.fullmatch(r"replicate ?(, ?gradient partial)?", plain)
        if whole:
            return cls(Replicate(), gradient=Partial() if whole[1] else None)
        raise ValueError(f'"{text}" says no way to hold a parameter. Allowed: {ALLOWED}.')

    def kept_on(self, ranks: int) -> Shard | Replicate:
        """What the memory of each of so many ranks has of it: its part, also of what ranks share, which is
        gathered for a use; all, where a piece that is shared is no multiple of the ranks."""
        is_even = all(size % ranks == 0 for size in self.pieces)
        return Replicate() if any(self.parts) and not is_even else self.placement

    def gradient_on(self, ranks: int) -> Placement:
        """What one rank's gradient of what it keeps is."""
        kept = self.kept_on(ranks)
        return Partial() if kept != self.placement else self.gradient or kept

    def __str__(self) -> str:
        """The inverse of parse()."""
        match self.placement:
            case Shard(dim):
                pieces = format_pieces(self.pieces, self.parts)
                return f"shard({dim}: {pieces})" if pieces else f"shard({dim})"
            case Replicate():
                return "replicate" if self.gradient is None else "replicate, gradient partial"


def parse_pieces(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`"3072+1024/2"` -> the sizes, and the parts of each (none at all where none is said). Raises
    ValueError."""
    one = r" ?\d{1,15} ?(/ ?\d{1,9} ?)?"
    if not re.fullmatch(rf"{one}(\+{one})*", text):
        raise ValueError(f'"{text}" is no list of pieces. Write sizes such as "3072+1024+1024".')
    found = [piece.split("/") for piece in text.split("+")]
    pieces = tuple(int(piece[0]) for piece in found)
    parts = tuple(int(piece[1]) if len(piece) > 1 else 0 for piece in found)
    for piece in found:
        if len(piece) > 1 and not int(piece[1]):
            raise ValueError(
                f'"{"/".join(piece).strip()}": a piece has 1 part or more. Write a count that divides '
                f"{int(piece[0])} behind the slash, or no slash for a part for each rank."
            )
    parts = parts if any(len(piece) > 1 for piece in found) else ()
    check_pieces(pieces, parts)
    return pieces, parts


def count_of(text: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """An entry of `divide`: its name, and the pieces that it counts together, if it says so: `"conv_dim:
    96+32/1"`. Raises ValueError."""
    name, has_pieces, pieces = text.partition(":")
    return (name.strip(), *parse_pieces(pieces)) if has_pieces else (text, (), ())


def format_pieces(pieces: tuple[int, ...], parts: tuple[int, ...] = ()) -> str:
    """The inverse of parse_pieces."""
    counts = parts or (0,) * len(pieces)
    return "+".join(
        f"{size}/{count}" if count else str(size) for size, count in zip(pieces, counts, strict=True)
    )


def check_pieces(pieces: tuple[int, ...], parts: tuple[int, ...] = ()) -> None:
    """Raises ValueError for sizes that are no pieces of a dim; none at all are fine."""
    if parts and (len(parts) != len(pieces) or min(parts) < 0 or not any(parts)):
        raise ValueError(f"pieces {format_pieces(pieces)} want as many counts of parts, and some above 0.")
    if pieces and (len(pieces) < 2 or min(pieces) < 1) and not (parts and pieces[0] > 0):
        raise ValueError(f"pieces are {format_pieces(pieces)}. Give two sizes or more, each at least 1.")
    for size, count in zip(pieces, parts, strict=False):
        if count and size % count:
            raise ValueError(
                f"a piece of {size} can't be cut into {count} parts. Use a count that divides it."
            )


def parts_of(count: int, ranks: int) -> int:
    """Into how many parts `ranks` ranks cut a piece that has `count` of them; 0: one for each rank."""
    return min(count, ranks) if count else ranks


def size_on_a_rank(pieces: tuple[int, ...], parts: tuple[int, ...], ranks: int) -> int:
    """Of all pieces, what one rank uses."""
    counts = parts or (0,) * len(pieces)
    return sum(size // parts_of(count, ranks) for size, count in zip(pieces, counts, strict=True))


def why_not_shared(pieces: tuple[int, ...], parts: tuple[int, ...], ranks: int) -> str | None:
    """What is wrong with pieces over so many ranks, if anything is."""
    for size, count in zip(pieces, parts or (0,) * len(pieces), strict=True):
        n_parts = parts_of(count, ranks)
        if ranks % n_parts or (count and count % n_parts):
            return f"{ranks} ranks can't share {count} parts of {size} evenly"
        if size % n_parts:
            return f"{size} is no multiple of tp={ranks}"
    return None
