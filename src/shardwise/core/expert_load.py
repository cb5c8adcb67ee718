"""ExpertLoad: how many of a step's choices went to each expert of a mixture, and to each rank that holds
some."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """choices: of tokens, by expert. dropped: those that went to none. ranks: over how many experts are
    shared out, in their order; 1: every rank has a part of each, or all. whole: choices in the whole step,
    over all ranks."""

    module: str
    choices: tuple[int, ...]
    dropped: int
    ranks: int
    whole: int

    @property
    def mean(self) -> float:
        """Choices of an expert, were the load balanced."""
        return sum(self.choices) / len(self.choices)

    @property
    def hottest(self) -> int:
        """The expert with the most choices."""
        return max(range(len(self.choices)), key=lambda expert: self.choices[expert])

    @property
    def hottest_ratio(self) -> float:
        """Its choices over the mean."""
        return self.choices[self.hottest] / self.mean if self.mean else 1.0

    @property
    def idle(self) -> int:
        """Experts that nobody chose."""
        return self.choices.count(0)

    @property
    def by_rank(self) -> tuple[int, ...]:
        """Choices that come to each rank."""
        own = len(self.choices) // self.ranks
        return tuple(sum(self.choices[rank * own : (rank + 1) * own]) for rank in range(self.ranks))

    @property
    def hottest_rank(self) -> int:
        return max(range(self.ranks), key=lambda rank: self.by_rank[rank])

    @property
    def rank_ratio(self) -> float:
        """What comes to the hottest rank over the mean rank's."""
        return (
            self.by_rank[self.hottest_rank] / (self.mean * len(self.choices) / self.ranks)
            if self.mean
            else 1.0
        )

    @classmethod
    def over_ranks(cls, loads: Iterable[Self]) -> tuple[Self, ...]:
        """What all ranks saw of each module, together. Where several ranks had the same tokens (all of tp,
        where experts are cut inside), each choice counts once: choices are as many as the step has."""
        found: dict[str, Self] = {}
        for load in loads:
            before = found.get(load.module)
            if before is not None:
                choices = tuple(map(sum, zip(before.choices, load.choices, strict=True)))
                load = replace(load, choices=choices, dropped=before.dropped + load.dropped)
            found[load.module] = load
        return tuple(each._counted_once() for each in found.values())

    def _counted_once(self) -> Self:
        times = max(1, (sum(self.choices) + self.dropped) // self.whole)
        return replace(
            self, choices=tuple(count // times for count in self.choices), dropped=self.dropped // times
        )
