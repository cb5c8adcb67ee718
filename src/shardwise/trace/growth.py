"""What one more layer adds to a step, kept from one trace for the next: of a model that differs from one
traced before in its batch, its recompute or its ends alone, LONG layers are traced and SHORT aren't.

The items of SHORT layers are made from those of LONG by leaving a layer out, and go through extend.py as
traced ones do: what a layer runs is held to what the layer beside it runs. What lies between rows of layers
is laid beside what LONG layers ran there before. What was there once per layer still is; what grew must be
the same, down to its sizes, or grow with a layer's parameters alone; what didn't grow doesn't now; and what
wasn't there must be a forward's or a backward's and, if it belongs to a layer, to the first or the last
one. What doesn't pass raises NotPeriodicError, and SHORT layers are traced as well.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from shardwise.core.layer_name import layer_index
from shardwise.core.program import (
    ONCE,
    REPLICATED_PARAMETERS,
    Collective,
    Holding,
    Item,
    MemoryChange,
    MemoryKind,
    Op,
    TensorSpec,
    moved,
)
from shardwise.models.source import ModelSource
from shardwise.trace.extend import LONG, SHORT, NotPeriodicError, Run, added_in, key_of, partners, parts_of
from shardwise.trace.step import Traced

KEPT = 16
"""So many growths are remembered, the newest first."""

Grown = tuple[Item | None, Item]
"""What an item is with SHORT layers (None: it isn't there), and the item with LONG ones."""
_Kept = tuple[Item | None, bool]
"""What an item of LONG layers is with SHORT ones, and whether it is of the layer that runs right after the
one that is left out."""


@dataclass(frozen=True, slots=True)
class Growth:
    """From SHORT layers in each row of a model's to LONG. layers: what is held of their parameters. resident:
    bytes that come with a layer. gaps: what lies between rows, in order."""

    prefix: str
    layers: tuple[Holding, ...]
    resident: tuple[tuple[MemoryKind, int], ...]
    gaps: tuple[tuple[Grown, ...], ...]

    @classmethod
    def between(cls, short: Traced, long: Traced, prefix: str) -> "Growth":
        """Raises NotPeriodicError."""
        fewer, more_parts = parts_of(short.items, prefix, SHORT), parts_of(long.items, prefix, LONG)
        if len(fewer) != len(more_parts):
            raise NotPeriodicError("other stretches with a layer more")
        gaps = tuple(
            tuple(zip(partners(a, b, prefix), b, strict=True))
            for a, b in zip(fewer, more_parts, strict=True)
            if isinstance(a, tuple) and isinstance(b, tuple)
        )
        more = {kind: n_bytes - short.resident.get(kind, 0) for kind, n_bytes in long.resident.items()}
        return cls(prefix, tuple(_of_layers(long, prefix)), tuple(more.items()), gaps)

    def short_of(self, long: Traced) -> Traced:
        """The step of SHORT layers; without holdings. Raises NotPeriodicError."""
        if tuple(_of_layers(long, self.prefix)) != self.layers:
            raise NotPeriodicError("other layers")
        more = dict(self.resident)
        resident = {kind: n_bytes - more.get(kind, 0) for kind, n_bytes in long.resident.items()}
        items = list(_with_distances(long.items, list(self._kept(long.items))))
        return Traced(tuple(items), (), resident)

    def _kept(self, long: Sequence[Item]) -> Iterator[_Kept]:
        parts = parts_of(long, self.prefix, LONG)
        if len(parts) != 2 * len(self.gaps) - 1:
            raise NotPeriodicError(f"{len(parts)} stretches, {2 * len(self.gaps) - 1} before")
        gaps = iter(self.gaps)
        for part in parts:
            match part:
                case Run():
                    yield from _kept_of_run(part, self.prefix)
                case _:
                    for item in _kept_of_gap(part, next(gaps), self.prefix):
                        yield item, False


class Growths:
    """Those of the models that this process has traced last, where it keeps them."""

    def __init__(self) -> None:
        self._are_kept = False
        self._known: list[tuple[ModelSource, Growth]] = []

    def keep(self, are_kept: bool = True) -> None:
        """From now on; False: what is known is forgotten, and nothing is kept any more."""
        self._are_kept = are_kept
        if not are_kept:
            self._known.clear()

    def note(self, source: ModelSource, short: Traced, long: Traced, prefix: str) -> None:
        """Two traces of one model."""
        if self._are_kept:
            try:
                self._known.insert(0, (source, Growth.between(short, long, prefix)))
            except NotPeriodicError:
                return
            del self._known[KEPT:]

    def short_of(self, source: ModelSource, long: Traced, prefix: str) -> Traced | None:
        """The step of SHORT layers, where one of the model's growths tells it."""
        for growth in [each for own, each in self._known if own is source and each.prefix == prefix]:
            try:
                return growth.short_of(long)
            except NotPeriodicError:
                continue
        return None


growths = Growths()


def _of_layers(traced: Traced, prefix: str) -> Iterator[Holding]:
    return (each for each in traced.holdings if layer_index(each.module, prefix) is not None)


def _kept_of_run(run: Run, prefix: str) -> Iterator[_Kept]:
    """Without the last layer but one."""
    left_out = 1 if run.backward else LONG - 2
    start, stop, *further = (*run.cuts[left_out:], len(run.items))
    for at, item in enumerate(run.items):
        if start <= at < stop:
            yield None, False
        else:
            is_last = at < start if run.backward else at >= stop
            yield moved(item, prefix, -1) if is_last else item, stop <= at < further[0]


def _kept_of_gap(gap: Sequence[Item], known: Sequence[Grown], prefix: str) -> Iterator[Item | None]:
    before = [_token(item, prefix) for _, item in known]
    matcher = SequenceMatcher(None, before, [_token(item, prefix) for item in gap], autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            yield from (
                _shorter(*pair, item, prefix) for pair, item in zip(known[a0:a1], gap[b0:b1], strict=True)
            )
            continue
        for short, long in known[a0:a1]:
            if short is None or not _is_alike(moved(short, prefix, _by(short, long, prefix)), long):
                raise NotPeriodicError(f"{long} grew, and isn't there")
        yield from (_at_an_end(item, prefix) for item in gap[b0:b1])


def _token(item: Item, prefix: str) -> Hashable:
    return key_of(item, prefix), layer_index(item.module, prefix)


def _shorter(short: Item | None, long: Item, item: Item, prefix: str) -> Item | None:
    """What `item` is with SHORT layers, where `long` was `short`."""
    if short is None:
        return None
    by = _by(short, long, prefix)
    item, same = moved(item, prefix, -by), moved(long, prefix, -by)
    if _is_alike(short, same):
        return item
    if _is_alike(item, same):
        return _with_own_places(short, item)
    match short, same, item:
        case Op(), Op(), Op():
            # what a list's tensors are put together to grows as the list does
            has_list = (len(short.inputs), len(short.outputs)) != (len(same.inputs), len(same.outputs))
            is_free = has_list or item.phase in ONCE
            return replace(
                item,
                inputs=_fewer_specs(short.inputs, same.inputs, item.inputs, is_free),
                outputs=_fewer_specs(short.outputs, same.outputs, item.outputs, is_free),
                flops=item.flops - (same.flops - short.flops),
                read_bytes=item.read_bytes - (same.read_bytes - short.read_bytes),
                write_bytes=item.write_bytes - (same.write_bytes - short.write_bytes),
            )
        case Collective(), Collective(), Collective() if _is_of_parameters(item):
            call = replace(
                item.call,
                payload_bytes=item.call.payload_bytes - (same.call.payload_bytes - short.call.payload_bytes),
                wire_bytes=item.call.wire_bytes - (same.call.wire_bytes - short.call.wire_bytes),
            )
            return replace(item, call=call)
        case MemoryChange(), MemoryChange(), MemoryChange() if _is_of_parameters(item):
            return replace(item, n_bytes=item.n_bytes - (same.n_bytes - short.n_bytes))
    raise NotPeriodicError(f"{item} grows, and was {long}")


def _is_of_parameters(item: Collective | MemoryChange) -> bool:
    """Whether what a layer adds to its size is of the layer's parameters, whatever the batch."""
    if item.phase in ONCE:
        return True
    if isinstance(item, Collective):
        return item.module == REPLICATED_PARAMETERS
    return item.kind in (MemoryKind.PARAMETER, MemoryKind.GRADIENT, MemoryKind.OPTIMIZER)


def _fewer_specs(
    short: tuple[TensorSpec, ...], long: tuple[TensorSpec, ...], specs: tuple[TensorSpec, ...], is_free: bool
) -> tuple[TensorSpec, ...]:
    """Without what a layer adds: tensors of a list, which must be the same, or some of a tensor's sizes,
    where the others are the same; unless is_free, all of them."""
    if short == long:
        return specs
    if len(long) != len(specs):
        raise NotPeriodicError("a list of another length grows")
    if len(short) == len(long):
        if not is_free and specs != long:
            raise NotPeriodicError("a tensor of another size grows")
        return tuple(map(_smaller_spec, short, long, specs))
    added = added_in(short, long)
    if added is None or any(long[start:stop] != specs[start:stop] for start, stop in added):
        raise NotPeriodicError("a list grows in another way")
    left_out = {at for start, stop in added for at in range(start, stop)}
    return tuple(spec for at, spec in enumerate(specs) if at not in left_out)


def _smaller_spec(short: TensorSpec, long: TensorSpec, spec: TensorSpec) -> TensorSpec:
    if short == long:
        return spec
    ranks = {len(each.shape) for each in (short, long, spec)}
    sizes = list(zip(short.shape, long.shape, spec.shape, strict=False))
    if len(ranks) > 1 or any(before == after != now for before, after, now in sizes):
        raise NotPeriodicError("a tensor with other sizes grows")
    return TensorSpec(spec.dtype, tuple(now - (after - before) for before, after, now in sizes))


def _by(short: Item, long: Item, prefix: str) -> int:
    """1 for what belongs to the last layer, 0 for all else."""
    below, above = layer_index(short.module, prefix), layer_index(long.module, prefix)
    return 0 if below is None or above is None else above - below


def _at_an_end(item: Item, prefix: str) -> Item:
    """What wasn't there before."""
    layer = layer_index(item.module, prefix)
    if item.phase in ONCE or layer not in (None, 0, LONG - 1):
        raise NotPeriodicError(f"{item} wasn't there before")
    return item if not layer else moved(item, prefix, -1)


def _is_alike(one: Item, other: Item) -> bool:
    """But for where those stand that they are counted from."""
    return _with_own_places(one, other) == other


def _with_own_places(item: Item, own: Item) -> Item:
    match item, own:
        case Collective(), Collective():
            return replace(item, again=own.again, added_to=own.added_to)
        case MemoryChange(), MemoryChange():
            return replace(item, nth=own.nth)
    return item


def _with_distances(long: Sequence[Item], kept: Sequence[_Kept]) -> Iterator[Item]:
    """Those that are kept, with their distances from the collectives that they are kin to."""
    places: list[int | None] = []  # of each collective, among those that are kept
    n_kept = 0
    for item, (own, is_after) in zip(long, kept, strict=True):
        if not isinstance(item, Collective):
            if own is not None:
                yield own
            continue
        if isinstance(own, Collective):
            again, added_to = (
                None if distance is None else _distance(places, n_kept, distance, is_after)
                for distance in (item.again, item.added_to)
            )
            yield replace(own, again=again, added_to=added_to)
        places.append(n_kept if own is not None else None)
        n_kept += own is not None


def _distance(places: Sequence[int | None], place: int, before: int, is_after: bool) -> int:
    """Among those that are kept, of one at `place` from that which was so many before it."""
    kin = places[-before] if before <= len(places) else None
    if kin is not None:
        return place - kin
    if is_after:  # to the one in the layer before its own, whichever that is
        return before
    raise NotPeriodicError("a collective is kin to one of the layer that is left out")
