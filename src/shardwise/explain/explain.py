"""explain(): Program -> Explanation. Groups what differs in nothing but its layer, adds reasons and findings;
no torch, no I/O."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from shardwise.core.explanation import (
    CollectiveGroup,
    CopyGroup,
    Explanation,
    HoldingGroup,
    PhaseTotals,
    RuleSummary,
)
from shardwise.core.layer_name import any_layer
from shardwise.core.program import (
    Collective,
    Holder,
    Holding,
    Item,
    MemoryChange,
    MemoryKind,
    MemoryPeak,
    Op,
    OpKind,
    Phase,
    Program,
    memory_peak,
)
from shardwise.explain.findings import findings_of, sharded
from shardwise.explain.reasons import carries_out, copy_reason, reason_of

# Ops that don't part a copy from the collective that it is for: views and sums cost no buffer of their own.
NEAR = 3
_Group = TypeVar("_Group", CollectiveGroup, CopyGroup, HoldingGroup)


def explain(program: Program) -> Explanation:
    """The whole explanation of one rank's step."""
    items = list(program.items())
    neighbours = list(_copies_and_neighbours(items))
    collectives = _collective_groups(items, neighbours)
    peak = memory_peak(program)
    holdings = _counted(map(_holding_group, program.holdings))
    return Explanation(
        model=program.model,
        parameters=program.parameters,
        plan=program.plan,
        engine=program.engine,
        device=program.device,
        rank=program.rank,
        axes=program.axes,
        settings=program.settings,
        layers=program.layers,
        collectives=collectives,
        copies=_copy_groups(neighbours),
        phases=tuple(_phase_totals(items)),
        holdings=holdings,
        rules=tuple(
            RuleSummary(use.pattern, str(use), len(use.modules), use.modules[0] if use.modules else "")
            for use in program.rules
        ),
        sharded_share=sharded(program).share,
        held=tuple(
            (kind, program.held(kind))
            for kind in (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
        ),
        peak=replace(peak, holders=_grouped_holders(peak)),
        findings=findings_of(program, items, collectives, holdings),
        notes=program.notes,
        stages=program.stages,
    )


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy, the collective that reads it (before) and the one whose result it copies (after), by their
    places in the step."""

    op: Op
    before: int | None
    after: int | None
    reason: str


def _copies_and_neighbours(items: Sequence[Item]) -> Iterator[_Copy]:
    """Every copy with the collective that it is for: the one within a few ops that moves as many bytes."""
    places = [index for index, item in enumerate(items) if not isinstance(item, MemoryChange)]
    for position, index in enumerate(places):
        op = items[index]
        if not isinstance(op, Op) or op.kind is not OpKind.COPY:
            continue
        before = _near(op, items, places[position + 1 : position + 1 + NEAR])
        after = (
            None if before is not None else _near(op, items, places[max(0, position - NEAR) : position][::-1])
        )
        yield _Copy(
            op, before, after, copy_reason(op, _collective_at(items, before), _collective_at(items, after))
        )


def _near(op: Op, items: Sequence[Item], places: Sequence[int]) -> int | None:
    for index in places:
        item = items[index]
        if isinstance(item, Collective):
            full, n = item.call.payload_bytes, item.call.axis_size
            fits = op.write_bytes in (full, full // n, full * (n - 1) // n)
            return index if fits and item.phase is op.phase else None
        assert isinstance(item, Op)
        if item.kind not in (OpKind.COPY, OpKind.FILL):
            return None
    return None


def _collective_at(items: Sequence[Item], index: int | None) -> Collective | None:
    item = items[index] if index is not None else None
    return item if isinstance(item, Collective) else None


def _counted(groups: Iterable[_Group]) -> tuple[_Group, ...]:
    """Equal groups as one, with how many there are."""
    return tuple(replace(group, count=count) for group, count in Counter(groups).items())


def _collective_groups(items: Sequence[Item], copies: Sequence[_Copy]) -> tuple[CollectiveGroup, ...]:
    copied: Counter[int] = Counter()
    for copy in copies:
        for index in (copy.before, copy.after):
            if index is not None:
                copied[index] += copy.op.write_bytes
    collectives = ((index, item) for index, item in enumerate(items) if isinstance(item, Collective))
    return _counted(_collective_group(item, copied[index]) for index, item in collectives)


def _collective_group(item: Collective, copied_bytes: int) -> CollectiveGroup:
    call = item.call
    return CollectiveGroup(
        kind=call.kind,
        carries_out=carries_out(item),
        axis=call.axis,
        axis_size=call.axis_size,
        phase=item.phase,
        module=any_layer(item.module),
        rule=item.rule,
        before=item.before,
        after=item.after,
        dtype=call.dtype,
        count=1,
        payload_bytes=call.payload_bytes,
        wire_bytes=call.wire_bytes,
        copied_bytes=copied_bytes,
        by_data=item.by_data,
        reason=reason_of(item),
    )


def _copy_groups(copies: Sequence[_Copy]) -> tuple[CopyGroup, ...]:
    groups = _counted(map(_copy_group, copies))
    return tuple(sorted(groups, key=lambda group: -group.total_bytes))


def _copy_group(copy: _Copy) -> CopyGroup:
    op = copy.op
    spec, module = (op.outputs or op.inputs)[0], any_layer(op.module)
    return CopyGroup(op.name, op.phase, module, spec.shape, spec.dtype, 1, op.write_bytes, copy.reason)


def _phase_totals(items: Sequence[Item]) -> Iterator[PhaseTotals]:
    for phase in Phase:
        ops = [item for item in items if isinstance(item, Op) and item.phase is phase]
        calls = [item.call for item in items if isinstance(item, Collective) and item.phase is phase]
        if ops or calls:
            yield PhaseTotals(
                phase,
                ops=len(ops),
                unknown_ops=sum(op.kind is OpKind.UNKNOWN for op in ops),
                flops=sum(op.flops for op in ops),
                moved_bytes=sum(op.read_bytes + op.write_bytes for op in ops),
                collectives=len(calls),
                wire_bytes=sum(call.wire_bytes for call in calls),
            )


# what a group has of the parameters in it, beside their names and their number
_OF_HOLDING = [field.name for field in fields(HoldingGroup) if field.name not in ("name", "count")]


def _holding_group(holding: Holding) -> HoldingGroup:
    alike = {name: getattr(holding, name) for name in _OF_HOLDING}
    return HoldingGroup(name=any_layer(holding.name), count=1, **alike)


def _grouped_holders(peak: MemoryPeak) -> tuple[Holder, ...]:
    groups: dict[tuple[MemoryKind, Phase, str, str], tuple[int, int]] = {}
    for holder in peak.holders:
        key = (holder.kind, holder.phase, any_layer(holder.module), holder.maker)
        n_bytes, count = groups.get(key, (0, 0))
        groups[key] = (n_bytes + holder.n_bytes, count + holder.count)
    holders = (Holder(*key, n_bytes, count) for key, (n_bytes, count) in groups.items())
    return tuple(sorted(holders, key=lambda holder: -holder.n_bytes))
