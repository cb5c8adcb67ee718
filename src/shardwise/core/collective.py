"""Collectives as data: which one, who asked and why, and what one rank sends by the named algorithm.

Notation: n ranks; `full` is the whole tensor that the collective is about (the input of a reduce-scatter or
scatter, the output of an all-gather or gather, the tensor of an all-reduce, reduce, broadcast, send or recv,
one rank's input of an all-to-all). `wire bytes` is what one rank sends.

    all-reduce      ring      2 (n-1)/n x full      Patarasuk & Yuan 2009
    all-gather      ring        (n-1)/n x full      Chan et al. 2007
    reduce-scatter  ring        (n-1)/n x full      Chan et al. 2007
    all-to-all      pairwise    (n-1)/n x full      with uneven splits, what the rank sends to others
    broadcast       pipeline          1 x full      Chan et al. 2007: once down the ring
    reduce          pipeline          1 x full      Chan et al. 2007: a broadcast the other way round
    gather, scatter direct      (n-1)/n x full      Chan et al. 2007: what passes the root's link
    send                              1 x full      to one other rank
    recv                              0             the other rank sends it
    barrier                           0             it carries no data
    unknown                           1 x full      nobody knows the algorithm: the largest argument, once

Where ranks differ (a root), the most that one of them sends or receives is counted for all.

What this file does not know: time. Backends may send more than the formula (gloo's reduce-scatter sends twice
as much).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from shardwise.core.placement import Placement
from shardwise.core.rule import RuleRef


class CollectiveKind(StrEnum):
    """What ranks exchange. unknown: an op that exchanges something, and that no table knows."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    REDUCE = "reduce"
    GATHER = "gather"
    SCATTER = "scatter"
    SEND = "send"
    RECV = "recv"
    BARRIER = "barrier"
    UNKNOWN = "unknown"


TO_ONE_RANK = (CollectiveKind.SEND, CollectiveKind.RECV)
"""What one rank has goes to one other."""


def collective_name(op: str) -> str:
    """`reduce-scatter`, as people write the kind or a profiler's `reduce_scatter`."""
    return op.replace("_", "-")


TIMED = (
    CollectiveKind.ALL_REDUCE,
    CollectiveKind.ALL_GATHER,
    CollectiveKind.REDUCE_SCATTER,
    CollectiveKind.ALL_TO_ALL,
    CollectiveKind.BROADCAST,
)
"""The kinds that `calibrate` times and that a machine file may have rates for."""


def wire_bytes(kind: CollectiveKind, full_bytes: int, axis_size: int) -> float:
    """Bytes that each of `axis_size` ranks sends for a tensor of `full_bytes`, by the table above."""
    if axis_size == 1:
        return 0.0
    share = (axis_size - 1) / axis_size
    match kind:
        case CollectiveKind.ALL_REDUCE:
            return 2 * share * full_bytes
        case (
            CollectiveKind.ALL_GATHER
            | CollectiveKind.REDUCE_SCATTER
            | CollectiveKind.ALL_TO_ALL
            | CollectiveKind.GATHER
            | CollectiveKind.SCATTER
        ):
            return share * full_bytes
        case CollectiveKind.BROADCAST | CollectiveKind.REDUCE | CollectiveKind.SEND | CollectiveKind.UNKNOWN:
            return float(full_bytes)
        case CollectiveKind.RECV | CollectiveKind.BARRIER:
            return 0.0
        case _:
            assert_never(kind)


_OFF_MESH = "ranks "


def off_mesh(ranks: Iterable[int]) -> str:
    """Stands for an axis where a group is none of the mesh: "ranks 0-3", "ranks 0, 2, 5"; "ranks ?" where
    nobody tells."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return _OFF_MESH + (", ".join("-".join(map(str, run)) for run in runs) or "?")


def is_off_mesh(axis: str) -> bool:
    """Whether off_mesh() made this name: no axis of a mesh has a blank."""
    return axis.startswith(_OFF_MESH)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asked for a collective and why: module, rule (None: no rule of the plan asked), and the change of
    placement that it carries out."""

    module: str
    rule: RuleRef | None
    before: Placement
    after: Placement

    def turned(self, before: Placement, after: Placement) -> "Origin":
        """The same asker, for what the gradient needs on its way back."""
        return replace(self, before=before, after=after)

    def __str__(self) -> str:
        by = f" ({self.rule})" if self.rule is not None else ""
        return f"{self.module}{by}: {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """One collective as one rank issued it.

    payload_bytes: the `full` tensor of the table above as this rank sees it. wire_bytes: what this rank
    sends; for an all-to-all with uneven splits the bytes that really go to others. axis: of the mesh, or what
    off_mesh() says. op: the dispatcher's name, where the kind is unknown.
    """

    kind: CollectiveKind
    axis: str
    axis_size: int
    dtype: str
    payload_bytes: int
    wire_bytes: float
    phase: str
    op: str = ""
