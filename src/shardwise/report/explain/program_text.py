"""A Program as text: the whole step of one rank, op by op, in order; for reading, searching and comparing
line by line.

Equal layers that follow one another are written once, with how many there are. Sizes are exact: bytes and
FLOPs, with their digits in groups of three. Names come from a user's model; those that don't print are
escaped.
"""

from collections.abc import Iterable, Iterator

from shardwise.core.case import StepSettings
from shardwise.core.layer_name import layer_index
from shardwise.core.placement import Placement
from shardwise.core.program import (
    Block,
    Collective,
    Holding,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    Phase,
    Program,
    memory_peak,
)
from shardwise.core.shown import shown
from shardwise.report.common.plain import recompute_text

_Place = tuple[Phase, str]


def program_text(program: Program) -> str:
    """The program, from what is held before the step to the peak; ends in a newline."""
    lines = [*_heading(program), "", *_holdings(program)]
    for block in program.blocks:
        lines += ["", *_block(block)]
    lines += ["", *_peak(program)]
    return "\n".join(lines) + "\n"


def _heading(program: Program) -> Iterator[str]:
    settings = program.settings
    mesh = ",".join(f"{name}={size}" for name, size in program.axes)
    yield (
        f"{shown(program.model)} under {shown(program.plan)} ({program.engine}), mesh {mesh}, rank "
        f"{program.rank}, {program.device}"
    )
    yield (
        f"batch {settings.batch}, sequence {settings.seq}, {settings.precision}, micro-batches "
        f"{settings.accumulation}, "
        f"recompute {recompute_text(settings)}{_of_fsdp(settings)}"
    )


def _of_fsdp(settings: StepSettings) -> str:
    once = ", gradients reduced once" if settings.reduce_once else ""
    return once + ("" if settings.reshard_after_forward else ", parameters kept after the forward")


def _holdings(program: Program) -> Iterator[str]:
    yield "held"
    for holding in program.holdings:
        yield f"    {shown(holding.name)}  {holding.dtype}{list(holding.shape)}{_kept(holding)}"
    for kind, n_bytes in program.resident:
        yield f"    {kind} {n_bytes:,} B"


def _kept(holding: Holding) -> str:
    here = (
        f", here {list(holding.local_shape)}: {_placements(holding.placement)}"
        if holding.is_sharded
        else ", whole"
    )
    if holding.grad_placement is None:
        return f"{here}; no gradient"
    alike = holding.grad_placement == holding.placement and holding.grad_shape == holding.local_shape
    return (
        here
        if alike
        else f"{here}; gradient {list(holding.grad_shape or ())}: {_placements(holding.grad_placement)}"
    )


def _placements(placements: Iterable[Placement]) -> str:
    return ", ".join(map(str, placements))


def _block(block: Block) -> Iterator[str]:
    indent = ""
    if block.times > 1:
        first = next(
            index for item in block.items if (index := layer_index(item.module, block.prefix)) is not None
        )
        last = first + block.stride * (block.times - 1)
        yield f"{block.times} times, for {shown(block.prefix)}.{first} to {shown(block.prefix)}.{last}:"
        indent = "    "
    place: _Place | None = None
    for item in block.items:
        here = (item.phase, item.module)
        is_freed = (
            isinstance(item, MemoryChange) and item.n_bytes < 0
        )  # it tells where it was made; it goes where it stands
        if not is_freed and place != here:
            place = here
            yield f"{indent}{_where(here)}"
        yield f"{indent}    {_item(item, place)}"


def _where(place: _Place) -> str:
    phase, module = place
    return f"{phase}  {shown(module) or '(outside all modules)'}"


def _item(item: Item, place: _Place | None) -> str:
    match item:
        case Op():
            return _op(item)
        case Collective():
            return _collective(item)
        case MemoryChange(n_bytes) if n_bytes > 0:
            return f"+ {n_bytes:,} B {item.kind} of {item.maker}"
        case MemoryChange(n_bytes):
            made = (item.phase, item.module)
            return f"- {-n_bytes:,} B {item.kind} of {item.maker}" + (
                f", {_where(made)}" if made != place else ""
            )


def _op(op: Op) -> str:
    work = f"{op.flops:,} FLOP, " if op.flops else ""
    host = ", on the host" if op.on_host else ""
    changed = ", ".join(map(str, op.outputs)) or "in place"
    return (
        f"{op.name}({', '.join(map(str, op.inputs))}) -> {changed}  {op.kind}, {work}reads {op.read_bytes:,} "
        f"B, writes {op.write_bytes:,} B{host}"
    )


def _collective(collective: Collective) -> str:
    call = collective.call
    change = f", {collective.before} -> {collective.after}" if collective.before is not None else ""
    rule = f", by {shown(collective.rule)}" if collective.rule is not None else ""
    sent = f"{call.wire_bytes:,.0f}" if float(call.wire_bytes).is_integer() else f"{call.wire_bytes:,.2f}"
    by_data = ""
    if collective.by_data is not None:
        data = collective.by_data
        load = "balanced" if data.expert_load == 1 else f"{data.expert_load} times the mean to one rank"
        by_data = (
            f" (a router decides: {load}; at most {data.bound_bytes:,.0f} B)"
            if data.expert_load is not None
            else f" (the batch decides: mean {data.mean_bytes:,.0f} B, most {data.max_bytes:,.0f} B by rank "
            f"{data.max_rank} of the axis)"
        )
    return (
        f"=> {call.kind} on {call.axis} of {call.axis_size}: {call.payload_bytes:,} B of {call.dtype}, sends "
        f"{sent} B{by_data}{change}{rule}"
    )


def _peak(program: Program) -> Iterator[str]:
    peak = memory_peak(program)
    where = (
        f"{peak.doing} in {shown(peak.module) or 'no module'} ({peak.phase})"
        if peak.doing
        else "before the step"
    )
    yield f"peak {peak.n_bytes:,} B at {where}"
    for kind, n_bytes in peak.by_kind:
        yield f"    {kind} {n_bytes:,} B"
    kept = ", ".join(
        f"{kind} {program.held(kind):,} B"
        for kind in (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)
    )
    yield f"kept after the step: {kept}"
