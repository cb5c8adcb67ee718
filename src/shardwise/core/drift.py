"""Drift: what ranks must hold alike at a step, and don't. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_MOST_RANKS = 8


class Held(StrEnum):
    """What ranks may hold alike; where several differ, the earlier one explains the later."""

    INPUT = "input"
    RANDOM = "random state"
    BUFFER = "buffer"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Drift:
    """The first thing that differs at a check. step: from 1, the one that was about to begin.

    axes: of the mesh, those along which it differs; none where the ranks have no mesh. ranks: those that
    should hold it alike, by value, most of them first. more: how many other things differ at the same check.
    is_first: at the first check, so that it was never alike. is_placed: a DTensor says that it is replicated.
    """

    step: int
    held: Held
    subject: str
    axes: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    more: int = 0
    is_first: bool = False
    is_placed: bool = False

    @property
    def reason(self) -> str:
        """What differs, where, on which ranks; no step, no advice."""
        return f"{self.named} {self.where}"

    @property
    def named(self) -> str:
        return f"{self.held} {self.subject}".strip()

    @property
    def where(self) -> str:
        """That it isn't the same, along which axes, on which ranks."""
        along = f" along {' and '.join(self.axes)}" if self.axes else ""
        return f"isn't the same on all ranks{along}: {self._who}"

    @property
    def advice(self) -> str:
        axes = " and ".join(self.axes)
        ranks = f"the ranks along {axes}" if axes else "all ranks"
        match self.held:
            case Held.INPUT:
                return (
                    f"Give {ranks} the same batch: which part a rank reads is said by its place on the "
                    "mesh's other axes; or name the axes whose ranks see the same in same_input=."
                )
            case Held.RANDOM:
                return (
                    f"Seed {ranks} alike, or dropout takes other elements of what they hold alike; "
                    "random=False leaves this out."
                )
            case Held.BUFFER | Held.WEIGHT if self.is_first:
                return (
                    "Build it from one seed on all ranks, or load one checkpoint, before it is sharded."
                    + ("" if self.is_placed else f" {_PARTS}")
                )
            case _:
                return (
                    f"Look for a gradient that isn't summed over {axes or ranks}, an optimizer that isn't "
                    "the same there, or a faulty device, where one rank alone differs."
                )

    def __str__(self) -> str:
        more = f", and {self.more} more" if self.more else ""
        return f"step {self.step}: {self.reason}{more}. {self.advice}"

    @property
    def _who(self) -> str:
        most, *others = self.ranks
        if not others:
            return f"{_ranks(most)} alone"
        if all(len(each) == 1 for each in self.ranks) and len(self.ranks) > 2:
            return "no two hold the same"
        if len(most) == len(others[0]):
            return f"{_ranks(most)} against {' against '.join(map(_ranks, others))}"
        odd = sorted(rank for each in others for rank in each)
        return f"{_ranks(odd)} against {_ranks(most)}"


_PARTS = "If its ranks hold parts of their own, say so with replicated=, or make it a DTensor."


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_RANKS]))
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"
