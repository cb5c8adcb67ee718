"""What one rank brings home, and how the ranks' measurements become one of each plan. Pure: no torch, no
processes.

A rank's own Measurement is one of a single rank: its times are the slowest, its bytes the mean and the
largest.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any, TypeVar

from shardwise.core.collective import CollectiveCall
from shardwise.core.expert_load import ExpertLoad
from shardwise.core.finding import Finding
from shardwise.core.measurement import CollectiveUse, Measurement, MemoryUse
from shardwise.core.verification import Agreement


@dataclass(frozen=True, slots=True)
class RankReport:
    """All that one rank returns: its Measurement of each plan in order, and findings that ended the run
    before it measured.

    variables: what the rank's environment says of threads, allocator and network.
    """

    measurements: tuple[Measurement, ...]
    findings: tuple[Finding, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def uses_of(calls: Iterable[CollectiveCall]) -> tuple[CollectiveUse, ...]:
    """One rank's calls summed by kind, axis and phase, in order of first appearance."""
    return tuple(map(_use, _alike(calls)))


def _use(calls: Sequence[CollectiveCall]) -> CollectiveUse:
    first, payload_bytes = calls[0], sum(call.payload_bytes for call in calls)
    wire_bytes = sum(call.wire_bytes for call in calls)
    return CollectiveUse(
        first.kind, first.axis, first.phase, len(calls), payload_bytes, wire_bytes, wire_bytes
    )


def merge(reports: Sequence[RankReport]) -> tuple[Measurement, ...]:
    """Measurements of all ranks -> one of each plan. A round's time is its slowest rank's; memory is the
    largest rank's."""
    return tuple(map(_merged, zip(*(report.measurements for report in reports), strict=True)))


def _merged(ranks: Sequence[Measurement]) -> Measurement:
    first = ranks[0]
    sent = [each.sent_bytes for each in ranks if each.sent_bytes is not None]
    modules = [each.module_times for each in ranks if each.module_times is not None]
    times = None
    if modules:
        forward_s, backward_s = (
            [getattr(each, half) for each in modules] for half in ("forward_s", "backward_s")
        )
        times = replace(modules[0], forward_s=_slowest(forward_s), backward_s=_slowest(backward_s))
    return replace(
        first,
        step_s=_slowest([each.step_s for each in ranks]),
        rank_step_s=tuple(each.step_s for each in ranks),
        memory=_largest([each.memory for each in ranks]),
        collectives=_over_ranks([use for each in ranks for use in each.collectives], len(ranks)),
        wire_bytes_largest_rank=max(each.wire_bytes_largest_rank for each in ranks),
        sent_bytes=fmean(sent) if len(sent) == len(ranks) else None,
        module_times=times,
        loads=ExpertLoad.over_ranks(load for each in ranks for load in each.loads),
    )


def _slowest(per_rank: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(max(times) for times in zip(*per_rank, strict=True))


def _largest(memories: Sequence[MemoryUse]) -> MemoryUse:
    def most(name: str) -> int | None:
        return max((n for n in (getattr(each, name) for each in memories) if n is not None), default=None)

    values: list[Any] = [most(each.name) for each in fields(MemoryUse)]
    return MemoryUse(*values)


def _over_ranks(uses: Iterable[CollectiveUse], n_ranks: int) -> tuple[CollectiveUse, ...]:
    return tuple(
        replace(
            alike[0],
            count=max(use.count for use in alike),
            payload_bytes=sum(use.payload_bytes for use in alike) / n_ranks,
            wire_bytes=sum(use.wire_bytes for use in alike) / n_ranks,
            wire_bytes_largest_rank=max(use.wire_bytes for use in alike),
        )
        for alike in _alike(uses)
    )


Collected = TypeVar("Collected", CollectiveCall, CollectiveUse)


def _alike(collected: Iterable[Collected]) -> Iterable[list[Collected]]:
    """Those of one kind, axis and phase together, in order of first appearance."""
    groups: dict[Hashable, list[Collected]] = {}
    for each in collected:
        groups.setdefault((each.kind, each.axis, each.phase), []).append(each)
    return groups.values()
