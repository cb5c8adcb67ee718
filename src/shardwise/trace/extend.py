"""From a step traced with 3 and with 4 equal layers to one with any number of them, exactly or not at all.

The layers' items stand in runs: forward, in the order of the layers, and backward, the other way round.
Between runs, and after the last, are gaps: embedding, head, loss, clipping, optimizer. Layer 1 of a run
(neither first nor last) is the template: a run with n more layers has n more of it. A gap may hold lists that
grow with the layers (the optimizer's) and items that are there once per layer (an all-reduce per norm
weight): what 4 layers have and 3 have not is there n more times, and what has another size grows by the same
amount again.

It is exact because a step is deterministic: if layer 2 runs what layer 1 ran, so does every further one.
Checked each time: the run of 3 layers, extended by one, is the run of 4. What doesn't pass raises
NotPeriodicError, and the caller traces every layer.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby, zip_longest

from shardwise.core.collective import TO_ONE_RANK, CollectiveCall
from shardwise.core.layer_name import layer_index, moved_name
from shardwise.core.program import (
    IN_LAYERS,
    Block,
    Collective,
    Item,
    MemoryChange,
    Op,
    Phase,
    TensorSpec,
    moved,
)

SHORT, LONG = 3, 4


class NotPeriodicError(Exception):
    """The layers don't repeat as the method needs; says where."""


@dataclass(frozen=True, slots=True)
class Run:
    """Items of all layers in one direction: cuts[i] is where the (i+1)-th layer met begins."""

    items: tuple[Item, ...]
    cuts: tuple[int, ...]
    backward: bool


Part = Run | tuple[Item, ...]


def extended(short: Sequence[Item], long: Sequence[Item], prefix: str, count: int) -> tuple[Block, ...]:
    """The blocks of `count` layers (at least LONG) from items of SHORT and LONG. Raises NotPeriodicError."""
    parts_short, parts_long = parts_of(short, prefix, SHORT), parts_of(long, prefix, LONG)
    if len(parts_short) != len(parts_long):
        raise NotPeriodicError(
            f"{len(parts_short)} stretches with {SHORT} layers, {len(parts_long)} with {LONG}"
        )
    more = count - LONG
    blocks: list[Block] = []
    for part_short, part_long in zip(parts_short, parts_long, strict=True):
        match part_short, part_long:
            case Run(), Run():
                whole = [item for block in _longer_run(part_short, prefix, 1) for item in block]
                if tuple(whole) != part_long.items:
                    raise NotPeriodicError(_first_difference(whole, part_long.items))
                blocks.extend(_longer_run(part_long, prefix, more))
            case tuple(), tuple():
                blocks.append(Block(tuple(_longer_gap(part_short, part_long, more, prefix))))
            case _:
                raise NotPeriodicError("runs and gaps come in another order")
    return tuple(block for block in blocks if block.items)


def parts_of(items: Sequence[Item], prefix: str, count: int) -> list[Part]:
    """Gaps and runs in turn, beginning and ending with a gap."""
    stretches = list(stretches_of_layers(items, prefix))
    parts: list[Part] = []
    done = 0
    while stretches:
        run, stretches = stretches[:count], stretches[count:]
        backward = run[0].backward
        first = min(each.layer for each in run)
        order = range(first + count - 1, first - 1, -1) if backward else range(first, first + count)
        for layer, stretch in zip_longest(order, run):
            if stretch is None or (stretch.layer, stretch.backward) != (layer, backward):
                raise NotPeriodicError(f"layer {layer} isn't where it was expected")
        start, stop = run[0].start, run[-1].stop
        parts.append(tuple(items[done:start]))
        parts.append(Run(tuple(items[start:stop]), tuple(each.start - start for each in run), backward))
        done = stop
    parts.append(tuple(items[done:]))
    return parts


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where the items of one layer stand, in one direction."""

    layer: int
    backward: bool
    start: int
    stop: int


def stretches_of_layers(items: Sequence[Item], prefix: str) -> Iterator[Stretch]:
    rows = (
        (layer_index(item.module, prefix), item.phase is not Phase.FORWARD, index)
        for index, item in enumerate(items)
        if not isinstance(item, MemoryChange) and item.phase in IN_LAYERS and not _is_passed_on(item)
    )
    inside = ((layer, backward, index) for layer, backward, index in rows if layer is not None)
    done = 0
    for (layer, backward), group in groupby(inside, key=lambda row: row[:2]):
        indices = [index for *_, index in group]
        start, stop = indices[0], indices[-1] + 1
        while start > done and _is_made_in(items[start - 1], layer, prefix):
            start -= 1
        yield Stretch(layer, backward, start, stop)
        done = stop


def _is_made_in(item: Item, layer: int, prefix: str) -> bool:
    """Whether it is what an op of the layer makes, which stands before the op."""
    return isinstance(item, MemoryChange) and item.n_bytes > 0 and layer_index(item.module, prefix) == layer


def _is_passed_on(item: Op | Collective) -> bool:
    """Between stages of a pipeline, whose layers may be another rank's."""
    return isinstance(item, Collective) and item.call.kind in TO_ONE_RANK


def _longer_run(run: Run, prefix: str, more: int) -> list[Block]:
    """The run with `more` layers more, as at most three blocks."""
    count = len(run.cuts)
    template = count - 2 if run.backward else 1  # the layer met last but one, or second: layer 1 both times
    start, stop = run.cuts[template], run.cuts[template + 1]
    if run.backward:
        # layers count-1 .. 2 come first, `more` further up; then layer 1 as it would be at 1 + more, down to
        # itself; then layer 0
        before = tuple(moved(item, prefix, more) for item in run.items[:start])
        middle = Block(
            tuple(moved(item, prefix, more) for item in run.items[start:stop]), 1 + more, prefix, -1
        )
        return [Block(before), middle, Block(run.items[stop:])]
    after = tuple(moved(item, prefix, more) for item in run.items[stop:])
    return [Block(run.items[:start]), Block(run.items[start:stop], 1 + more, prefix, 1), Block(after)]


def key_of(item: Item, prefix: str) -> tuple[Hashable, ...]:
    """What an item is, whatever its sizes."""
    module = _any_layer(item.module, prefix)
    match item:
        case Op():
            return ("op", item.name, item.phase, module)
        case Collective():
            return ("collective", item.call.kind, item.call.axis, item.call.phase, module)
        case MemoryChange():
            return ("memory", item.n_bytes > 0, item.kind, item.phase, module, item.maker)


def _any_layer(name: str, prefix: str) -> str:
    index = layer_index(name, prefix)
    return name if index is None else moved_name(name, prefix, -index)


def partners(short: Sequence[Item], long: Sequence[Item], prefix: str) -> list[Item | None]:
    """Of each of a gap's items with LONG layers what it is with SHORT ones; None: it isn't there. Raises
    NotPeriodicError."""
    keys_short, keys_long = [key_of(item, prefix) for item in short], [key_of(item, prefix) for item in long]
    counts_short, counts_long = Counter(keys_short), Counter(keys_long)
    once = {key for key, count in counts_long.items() if counts_short[key] == count}

    def tokens(items: Sequence[Item], keys: Sequence[Hashable]) -> list[Hashable]:
        return [
            key if key in once else (key, layer_index(item.module, prefix), _sizes(item))
            for item, key in zip(items, keys, strict=True)
        ]

    found: list[Item | None] = []
    matcher = SequenceMatcher(None, tokens(short, keys_short), tokens(long, keys_long), autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        kept, inserted = a1 - a0, (b1 - b0) - (a1 - a0)
        new: list[Item | None] = [None] * inserted
        match tag:
            case "equal" | "insert":
                found += [*short[a0:a1], *new]
            case "replace" if (
                inserted >= 0 and keys_short[a0:a1] == keys_long[b1 - kept : b1]
            ):  # grown items behind new ones
                found += [*new, *short[a0:a1]]
            case "replace" if inserted >= 0 and keys_short[a0:a1] == keys_long[b0 : b0 + kept]:
                found += [*short[a0:a1], *new]
            case _:
                raise NotPeriodicError(
                    f"{long[b0] if b0 < len(long) else short[a0]} is in one gap and not in the other"
                )
    return found


def _longer_gap(short: Sequence[Item], long: Sequence[Item], more: int, prefix: str) -> list[Item]:
    """What SHORT hasn't is there as many times again as there are further layers, in the order in which
    layers come there."""
    result: list[Item] = []
    keys = [key_of(item, prefix) for item in long]
    pairs = enumerate(partners(short, long, prefix))
    for is_new, group in groupby(pairs, key=lambda pair: pair[1] is None):
        own = list(group)
        if not is_new:
            result += [_longer_item(a, long[at], more, prefix) for at, a in own if a is not None]
            continue
        for first, last in _stretches(long, keys, own[0][0], own[-1][0] + 1):
            order = range(more + 1)
            for by in reversed(order) if _is_descending(long, keys, first, last, prefix) else order:
                result.extend(moved(item, prefix, by) for item in long[first:last])
    return result


def _stretches(
    items: Sequence[Item], keys: Sequence[Hashable], start: int, stop: int
) -> list[tuple[int, int]]:
    """New items that stand side by side may belong to two stretches that both grow: one goes on with what is
    before, one begins what follows."""

    def alike(a: int, b: int, count: int) -> bool:
        if a < 0 or b + count > len(items):
            return False
        return all(
            keys[a + i] == keys[b + i] and _sizes(items[a + i]) == _sizes(items[b + i]) for i in range(count)
        )

    for split in range(stop, start, -1):
        before, after = split - start, stop - split
        if alike(start - before, start, before) and alike(split, stop, after):
            return [(start, split), (split, stop)] if after else [(start, stop)]
    return [(start, stop)]


def _is_descending(
    items: Sequence[Item], keys: Sequence[Hashable], start: int, stop: int, prefix: str
) -> bool:
    """Whether the layer below the one in items[start:stop] comes after it."""
    own = layer_index(items[start].module, prefix)
    following = next((items[index] for index in range(stop, len(items)) if keys[index] == keys[start]), None)
    return own is not None and following is not None and layer_index(following.module, prefix) == own - 1


def _sizes(item: Item) -> Hashable:
    match item:
        case Op():
            return (item.inputs, item.outputs)
        case Collective():
            return item.call.payload_bytes
        case MemoryChange():
            return item.n_bytes


def _longer_item(short: Item, long: Item, more: int, prefix: str) -> Item:
    """What is there once, whatever the depth: its sizes grow on; what belongs to a layer counted from the
    last is the last's again."""
    if short == long or more == 0:
        return long
    below, above = layer_index(short.module, prefix), layer_index(long.module, prefix)
    if below is not None and above is not None:
        if above - below not in (0, 1):
            raise NotPeriodicError(f"{short.module} becomes {long.module}")
        long = moved(long, prefix, more * (above - below))
    match short, long:
        case Op(), Op():
            return replace(
                long,
                inputs=_longer_specs(short.inputs, long.inputs, more),
                outputs=_longer_specs(short.outputs, long.outputs, more),
                flops=_line(short.flops, long.flops, more),
                read_bytes=_line(short.read_bytes, long.read_bytes, more),
                write_bytes=_line(short.write_bytes, long.write_bytes, more),
            )
        case Collective(), Collective():
            return replace(
                long,
                call=_longer_call(short.call, long.call, more),
                again=_distance(short.again, long.again, more),
                added_to=_distance(short.added_to, long.added_to, more),
            )
        case MemoryChange(), MemoryChange():
            return replace(long, n_bytes=_line(short.n_bytes, long.n_bytes, more))
        case _:
            raise NotPeriodicError("items of two kinds")


def _longer_call(short: CollectiveCall, long: CollectiveCall, more: int) -> CollectiveCall:
    return replace(
        long,
        payload_bytes=_line(short.payload_bytes, long.payload_bytes, more),
        wire_bytes=long.wire_bytes + (long.wire_bytes - short.wire_bytes) * more,
    )


def _longer_specs(
    short: tuple[TensorSpec, ...], long: tuple[TensorSpec, ...], more: int
) -> tuple[TensorSpec, ...]:
    if len(short) == len(long):
        return tuple(_longer_spec(a, b, more) for a, b in zip(short, long, strict=True))
    added = added_in(short, long)
    if added is None:
        raise NotPeriodicError(f"lists of {len(short)} and {len(long)} tensors that don't repeat")
    result: list[TensorSpec] = []
    done = 0
    for start, stop in added:
        result += (*long[done:stop], *long[start:stop] * more)
        done = stop
    return (*result, *long[done:])


def added_in(short: tuple[TensorSpec, ...], long: tuple[TensorSpec, ...]) -> list[tuple[int, int]] | None:
    """Where `long` has what `short` lacks: a fused op's lists stand side by side in both, each with a layer's
    tensors once per layer. What is added must be what stands SHORT times before it; where it ends, nothing
    tells but that the rest fits."""
    open_paths: list[tuple[int, int, list[tuple[int, int]]]] = [(0, 0, [])]
    while open_paths:
        at, place, added = open_paths.pop()
        while at < len(short) and place < len(long) and short[at] == long[place]:
            at, place = at + 1, place + 1
        if at == len(short) and place == len(long):
            return added
        lacking = (len(long) - place) - (len(short) - at)
        for size in range(1, min(lacking, place // SHORT) + 1):  # the last, the largest, is tried first
            block = long[place : place + size]
            if long[place - size] == block[0] and long[place - SHORT * size : place] == block * SHORT:
                open_paths.append((at, place + size, [*added, (place, place + size)]))
    return None


def _longer_spec(short: TensorSpec, long: TensorSpec, more: int) -> TensorSpec:
    if short.dtype != long.dtype or len(short.shape) != len(long.shape):
        raise NotPeriodicError(f"{short} becomes {long}")
    return TensorSpec(
        long.dtype, tuple(_line(a, b, more) for a, b in zip(short.shape, long.shape, strict=True))
    )


def _distance(short: int | None, long: int | None, more: int) -> int | None:
    """Of a collective from one that it is kin to: those between them may be of every layer."""
    return long if short is None or long is None else _line(short, long, more)


def _line(short: int, long: int, more: int) -> int:
    return long + (long - short) * more


def _first_difference(made: Sequence[Item], expected: Sequence[Item]) -> str:
    for index, (a, b) in enumerate(zip(made, expected, strict=False)):
        if a != b:
            return f"item {index}: {a} where {LONG} layers have {b}"
    return f"{len(made)} items where {LONG} layers have {len(expected)}"
