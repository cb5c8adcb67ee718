"""Findings of a Program: what a plan does that its author may not know, each with the numbers that show it
and what to do.

What is looked for: gradients that aren't sharded as their parameters; Partial gradients, reduced again by
whoever meets them; rules that match nothing; little that is sharded; copies made for collectives; collectives
that repeat or undo one another; ops that the catalogue doesn't know; what exchanges data in a way that no
table knows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from shardwise.core.collective import CollectiveKind, collective_name
from shardwise.core.explanation import CollectiveGroup, HoldingGroup
from shardwise.core.finding import Finding, FindingKind
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import TENSOR_AXIS, Mesh, Role, role_of
from shardwise.core.placement import Partial, Shard
from shardwise.core.program import Collective, Item, Op, OpKind, Phase, Program
from shardwise.core.rule import ModuleKind
from shardwise.core.sharded import Sharded
from shardwise.explain.kin import kin
from shardwise.explain.words import size

# Copies for collectives are said where they move at least this share of what goes over the wire.
WORTH_SAYING = 0.01


def sharded(program: Program) -> Sharded:
    """What of the parameters a rank doesn't hold whole."""
    return Sharded.of((prod(each.shape), each.is_sharded, each.is_outer) for each in program.holdings)


def findings_of(
    program: Program,
    items: Sequence[Item],
    collectives: Sequence[CollectiveGroup],
    holdings: Sequence[HoldingGroup],
) -> tuple[Finding, ...]:
    """All findings, in the order of the module docstring."""
    return (
        *_gradients(program, holdings),
        *_partial_gradients(holdings, items),
        *_idle_rules(program),
        *_little_sharded(program),
        *kin(program, items),
        *_cancels(items),
        *_copies(collectives),
        *_unknown(items),
        *_unknown_collectives(items),
    )


def _gradients(program: Program, holdings: Sequence[HoldingGroup]) -> Iterator[Finding]:
    tables = {any_layer(h.name) for h in program.holdings if h.module_kind is ModuleKind.EMBEDDING}
    for holding in holdings:
        if holding.grad_shape is None or holding.grad_placement is None:
            continue
        own, kept = prod(holding.local_shape), prod(holding.grad_shape)
        if own != kept and own:
            times = kept / own
            yield Finding(
                FindingKind.GRADIENT_NOT_AS_PARAMETER,
                holding.name,
                f"its gradient is {_list(holding.grad_placement)} {list(holding.grad_shape)}, "
                f"{times:g} times its shard {list(holding.local_shape)}: {size(holding.gradient_bytes)} on "
                f"every rank where {size(holding.gradient_bytes / times)} "
                "would do" + (f", in each of {holding.count}" if holding.count > 1 else ""),
                advice=_advice_for_gradient(holding, is_table=holding.name in tables),
            )


def _advice_for_gradient(holding: HoldingGroup, *, is_table: bool) -> str:
    if is_table and Shard(0) in holding.placement:
        return (
            "DTensor's embedding backward has no rowwise rule. The native engine keeps the shard's rows "
            "only; colwise keeps its columns."
        )
    return "Look for an op whose backward gathers it."


def _partial_gradients(holdings: Sequence[HoldingGroup], items: Sequence[Item]) -> Iterator[Finding]:
    partial = [holding for holding in holdings if Partial() in (holding.grad_placement or ())]
    if not partial:
        return
    count = sum(holding.count for holding in partial)
    over_tp = (item for item in items if isinstance(item, Collective) and item.call.axis == TENSOR_AXIS)
    by_phase = Counter(item.phase for item in over_tp if item.phase in (Phase.CLIP, Phase.OPTIMIZER))
    where = " and ".join(f"{number} all-reduces in {phase}" for phase, number in by_phase.items())
    yield Finding(
        FindingKind.PARTIAL_GRADIENT,
        ", ".join(holding.name for holding in partial[:3]) + (", ..." if len(partial) > 3 else ""),
        f"{count} gradients stay Partial after the backward, so whatever uses one reduces it again"
        + (f": {where}, the norm's own among them" if where else ""),
        advice="Reduce them once at the end of the backward, as the native engine does in one flattened "
        "all-reduce.",
    )


def _idle_rules(program: Program) -> Iterator[Finding]:
    for use in program.rules:
        if not use.modules:
            yield Finding(
                FindingKind.RULE_MATCHES_NOTHING,
                use.pattern,
                f"the rule ({use}) matched no module or parameter",
                advice="Mend the pattern, or take the rule out.",
            )


def _little_sharded(program: Program) -> Iterator[Finding]:
    for finding in sharded(program).findings(Mesh(program.axes).tp):
        whole_ones = (each for each in program.holdings if not each.is_sharded)
        largest = max(whole_ones, key=lambda each: each.parameter_bytes)
        whole = f"the largest that every rank holds whole is {largest.name}, {size(largest.parameter_bytes)}"
        yield replace(finding, reason=f"{finding.reason}; {whole}")


def _cancels(items: Sequence[Item]) -> Iterator[Finding]:
    """A collective that undoes the one before it, with nothing computed between them."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    last: Collective | None = None
    for item in items:
        if isinstance(item, Collective):
            if last is not None and _undoes(item, last):
                modules = any_layer(last.module), any_layer(item.module)
                found[*modules, collective_name(last.call.kind), collective_name(item.call.kind)] += 1
            last = item
        elif isinstance(item, Op) and item.kind not in (OpKind.COPY, OpKind.FILL):
            last = None
    for (first, second, gathered, undone), count in found.items():
        yield Finding(
            FindingKind.COLLECTIVES_CANCEL,
            second,
            f"its {undone} undoes the {gathered} of {first} with nothing computed between them, {count} "
            "times a step",
            advice="Let both agree on the placement between them.",
        )


def _undoes(second: Collective, first: Collective) -> bool:
    is_same = first.call.axis == second.call.axis and first.phase is second.phase
    sizes_match = first.call.payload_bytes == second.call.payload_bytes
    is_back = first.before is not None and (first.before, first.after) == (second.after, second.before)
    return is_same and sizes_match and is_back


def _copies(collectives: Sequence[CollectiveGroup]) -> Iterator[Finding]:
    copied = [group for group in collectives if group.copied_bytes]
    total = sum(group.count * group.copied_bytes for group in copied)
    wire = sum(group.total_wire_bytes for group in collectives)
    if total < WORTH_SAYING * wire or not copied:
        return
    worst = max(copied, key=lambda group: group.count * group.copied_bytes)
    yield Finding(
        FindingKind.COPIES_FOR_COLLECTIVES,
        _of_whom(worst),
        f"{size(total)} a step are copied into or out of collectives' buffers, {total / wire:.2g} times what "
        f"goes over the wire; most of it for the {collective_name(worst.carries_out)} of "
        f"{_of_whom(worst)} ({worst.phase})",
        advice="A placement that cuts the outermost dim, or a look-up in the order of the destinations, "
        "needs none.",
    )


def _of_whom(group: CollectiveGroup) -> str:
    """Its module, else what is exchanged for the whole step."""
    if group.module:
        return group.module
    if role_of(group.axis) is Role.SHARDS_PARAMETERS and group.carries_out is CollectiveKind.ALL_GATHER:
        return "FSDP's parameters"
    return "all gradients" if group.before == Partial() else "the step"


def _unknown(items: Sequence[Item]) -> Iterator[Finding]:
    names = Counter(item.name for item in items if isinstance(item, Op) and item.kind is OpKind.UNKNOWN)
    if names:
        yield Finding(
            FindingKind.OPS_UNKNOWN,
            "ops",
            f"{sum(names.values())} ops are unknown on this device, and their FLOPs and kind with them: "
            f"{_most_common(names)}",
            advice="Their shapes and bytes are exact. Half precision has fused attention on every device.",
        )


def _unknown_collectives(items: Sequence[Item]) -> Iterator[Finding]:
    collectives = [item for item in items if isinstance(item, Collective)]
    calls = [item for item in collectives if item.call.kind is CollectiveKind.UNKNOWN]
    if calls:
        names, first = Counter(item.call.op for item in calls), calls[0]
        yield Finding(
            FindingKind.COLLECTIVES_UNKNOWN,
            first.module or "the step",
            f"nobody knows what {len(calls)} of the collectives send: {_most_common(names)}, the first in "
            f"{first.phase}",
            advice="Counted as if each sent its largest argument once. Check them against the library that "
            "they come from.",
        )


def _most_common(names: Counter[str]) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in names.most_common(3))
    return shown + (", ..." if len(names) > 3 else "")


def _list(placements: Sequence[object]) -> str:
    return ", ".join(map(str, placements))
