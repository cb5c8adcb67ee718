"""Placement of a tensor on one mesh axis: Shard(dim), Replicate or Partial (each rank holds a summand). Names
as in PyTorch."""

import re
from dataclasses import dataclass
from typing import assert_never


@dataclass(frozen=True, slots=True)
class Shard:
    """Cut in equal chunks along `dim` (the last may be smaller or empty, as torch.chunk cuts); -1 is the last
    dim."""

    dim: int

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True, slots=True)
class Replicate:
    """The same whole tensor on every rank."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank holds one summand; the tensor is their sum."""

    def __str__(self) -> str:
        return "Partial"


Placement = Shard | Replicate | Partial

ALLOWED = "shard(DIM), replicate, partial"


def parse_placement(text: str) -> Placement:
    """`"shard(1)"`, `"replicate"` or `"partial"` -> Placement. Raises ValueError with what is allowed."""
    match = re.fullmatch(r"shard\((-?\d{1,2})\)", text.strip().lower())
    if match:
        return Shard(int(match[1]))
    match text.strip().lower():
        case "replicate":
            return Replicate()
        case "partial":
            return Partial()
        case _:
            raise ValueError(f'"{text}" is no placement. Allowed: {ALLOWED}.')


def format_placement(placement: Placement) -> str:
    """Placement -> the text that a plan file has: the inverse of parse_placement."""
    match placement:
        case Shard(dim):
            return f"shard({dim})"
        case Replicate():
            return "replicate"
        case Partial():
            return "partial"
        case _:
            assert_never(placement)
