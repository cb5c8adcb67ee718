"""ArgumentCut: which part a rank takes of a constant tensor that its module is given whole (a table of
slopes, one for each head), as a plan says it."""

import re
from dataclasses import dataclass
from typing import Self

ALLOWED = '"shard(DIM)", "shard(DIM) of every SIZE"'


@dataclass(frozen=True, slots=True)
class ArgumentCut:
    """dim: which is cut. every: where that dim has more in it (each sequence's heads one after the other),
    the length of the runs of which each rank takes its part; 0: it is one run."""

    dim: int
    every: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"shard(0) of every 16"` -> ArgumentCut. Raises ValueError with what is allowed."""
        plain = " ".join(text.lower().split())
        told = re.fullmatch(r"shard\( ?(-?\d{1,2}) ?\)( of every ([1-9]\d{0,8}))?", plain)
        if told is None:
            raise ValueError(f'"{text}" is no cut of an argument. Allowed: {ALLOWED}.')
        return cls(int(told[1]), int(told[3] or 0))

    def __str__(self) -> str:
        """The inverse of parse()."""
        return f"shard({self.dim})" + (f" of every {self.every}" if self.every else "")
