"""Sharded: how much of a model a plan shards, and when that is little; what explain and verify both go by."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from shardwise.core.finding import Finding, FindingKind

ENOUGH_INSIDE = 0.10
"""Share of the parameters outside embedding and head of which a rank must hold a part only."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """How many parameters (elements) there are, and how many of them a rank doesn't hold whole; in all, and
    outside embedding and head.

    Little is sharded where less than ENOUGH_INSIDE of the inner ones are. They are where the work is; a table
    is looked up, and whether to cut it is a choice that a right plan may make either way: under `replicated`
    half of a small model may be its table. A plan below the threshold cuts next to nothing between embedding
    and head, as one whose patterns match nothing there: each rank does nearly all of the work, and that every
    gradient is right proves nothing.
    """

    total: int
    sharded: int
    inner_total: int
    inner_sharded: int

    @classmethod
    def of(cls, parameters: Iterable[tuple[int, bool, bool]]) -> Self:
        """parameters: (elements, whether a rank keeps a part only, whether they are an embedding's or the
        head's) of each."""
        total = sharded = inner_total = inner_sharded = 0
        for elements, is_cut, is_outer in parameters:
            total += elements
            sharded += elements * is_cut
            inner_total += elements * (not is_outer)
            inner_sharded += elements * (is_cut and not is_outer)
        return cls(total, sharded, inner_total, inner_sharded)

    @property
    def share(self) -> float:
        return self.sharded / self.total if self.total else 0.0

    @property
    def inner_share(self) -> float:
        """Of all parameters where there are none but embedding and head."""
        return self.inner_sharded / self.inner_total if self.inner_total else self.share

    def findings(self, tp: int) -> tuple[Finding, ...]:
        """The one finding, if little is sharded over tp ranks."""
        if tp == 1 or self.inner_share >= ENOUGH_INSIDE:
            return ()
        reason = (
            f"{self.inner_share:.1%} of the parameters outside embedding and head are sharded over tp={tp}, "
            f"and {self.share:.1%} of all of them"
        )
        advice = (
            f"Below {ENOUGH_INSIDE:.0%} each rank does nearly all of the work: "
            "shardwise explain says which rules match what."
        )
        return (Finding(FindingKind.LITTLE_IS_SHARDED, "plan", reason, advice=advice),)
