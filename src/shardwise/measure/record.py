"""What one rank brings home of one plan's run, and how the ranks' records become Measurements. Pure: no
torch, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from shardwise.core.collective import CollectiveCall, CollectiveKind
from shardwise.core.finding import Finding
from shardwise.core.measurement import CollectiveUse, Measurement, MemoryUse, ModuleTimes
from shardwise.core.verification import Agreement


@dataclass(frozen=True, slots=True)
class Traffic:
    """One rank's collectives of one kind, axis and phase in one step."""

    kind: CollectiveKind
    axis: str
    phase: str
    count: int
    payload_bytes: int
    wire_bytes: float


def traffic(calls: Sequence[CollectiveCall]) -> tuple[Traffic, ...]:
    """Calls summed by kind, axis and phase, in order of first appearance."""
    groups: dict[tuple[CollectiveKind, str, str], list[CollectiveCall]] = {}
    for call in calls:
        groups.setdefault((call.kind, call.axis, call.phase), []).append(call)
    return tuple(
        Traffic(
            kind,
            axis,
            phase,
            len(group),
            sum(c.payload_bytes for c in group),
            sum(c.wire_bytes for c in group),
        )
        for (kind, axis, phase), group in groups.items()
    )


@dataclass(frozen=True, slots=True)
class RankRecord:
    """One rank's view of one plan's run; times in seconds, one per round."""

    label: str
    repeats: str | None
    plan_name: str
    plan_toml: str
    engine: str
    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    memory: MemoryUse
    traffic: tuple[Traffic, ...]
    sent_bytes: int | None
    module: str | None
    module_forward_s: tuple[float, ...]
    module_backward_s: tuple[float, ...]
    agreement: Agreement | None


@dataclass(frozen=True, slots=True)
class RankReport:
    """All that one rank returns: a record per plan in order, and findings that ended the run before it
    measured.

    variables: what the rank's environment says of threads, allocator and network.
    """

    records: tuple[RankRecord, ...]
    findings: tuple[Finding, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def merge(reports: Sequence[RankReport]) -> tuple[Measurement, ...]:
    """Records of all ranks -> one Measurement per plan. A round's time is its slowest rank's; memory is the
    largest rank's."""
    return tuple(_merge_one(records) for records in zip(*(report.records for report in reports), strict=True))


def _merge_one(records: Sequence[RankRecord]) -> Measurement:
    first = records[0]
    totals = [sum(use.wire_bytes for use in record.traffic) for record in records]
    sent = [record.sent_bytes for record in records if record.sent_bytes is not None]
    times = None
    if first.module is not None and first.module_forward_s:
        times = ModuleTimes(
            first.module,
            _slowest([record.module_forward_s for record in records]),
            _slowest([record.module_backward_s for record in records]),
        )
    return Measurement(
        label=first.label,
        repeats=first.repeats,
        plan_name=first.plan_name,
        plan_toml=first.plan_toml,
        engine=first.engine,
        step_s=_slowest([record.step_s for record in records]),
        rank_step_s=tuple(record.step_s for record in records),
        losses=first.losses,
        grad_norms=first.gradient_norms,
        memory=_largest([record.memory for record in records]),
        collectives=_merge_traffic(records),
        wire_bytes_largest_rank=max(totals),
        sent_bytes=fmean(sent) if len(sent) == len(records) else None,
        module_times=times,
        agreement=first.agreement,
    )


def _slowest(per_rank: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(max(times) for times in zip(*per_rank, strict=True))


def _largest(memories: Sequence[MemoryUse]) -> MemoryUse:
    def most(name: str) -> int | None:
        return max((n for n in (getattr(each, name) for each in memories) if n is not None), default=None)

    values: list[Any] = [most(each.name) for each in fields(MemoryUse)]
    return MemoryUse(*values)


def _merge_traffic(records: Sequence[RankRecord]) -> tuple[CollectiveUse, ...]:
    by_key: dict[tuple[CollectiveKind, str, str], list[Traffic]] = {}
    for record in records:
        for use in record.traffic:
            by_key.setdefault((use.kind, use.axis, use.phase), []).append(use)
    n_ranks = len(records)
    return tuple(
        CollectiveUse(
            kind=kind,
            axis=axis,
            phase=phase,
            count=max(use.count for use in uses),
            payload_bytes=sum(use.payload_bytes for use in uses) / n_ranks,
            wire_bytes=sum(use.wire_bytes for use in uses) / n_ranks,
            wire_bytes_largest_rank=max(use.wire_bytes for use in uses),
        )
        for (kind, axis, phase), uses in by_key.items()
    )
