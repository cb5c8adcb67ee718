"""The Program of a model of which a part of the layers runs again in the backward, from the one in which none
does and the one in which all do: exactly or not at all.

What a layer runs, forward and backward, doesn't ask what its neighbours do: its items are those of the
Program that treats it so, in its place: the first layer of a row, the last, or one in between. What lies
between rows of layers is alike in both, or where it isn't (what a layer leaves to be freed) it is that of the
layer before it. trace.py holds what is put together so to a trace of four layers, two of each
kind. What doesn't pass raises NotPeriodicError, and the caller traces every layer.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from shardwise.core.pipeline import Pipeline, Span, recomputed_spans
from shardwise.core.program import Block, Collective, Item, MemoryChange, Program, moved
from shardwise.trace.extend import NotPeriodicError, stretches_of_layers


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of layers in one direction, and what lies before it. first, last: items of the row's ends, under
    their own numbers; middle: of the layer `template`."""

    before: tuple[Item, ...]
    span: Span
    backward: bool
    first: tuple[Item, ...]
    middle: tuple[Item, ...]
    template: int
    last: tuple[Item, ...]

    @property
    def met(self) -> range:
        """Its layers, in the order in which they run."""
        return self.span.indices[::-1] if self.backward else self.span.indices

    def blocks(self, layers: Sequence[int], prefix: str) -> Iterator[Block]:
        """Of some layers in a row, in the order in which they run."""
        for role, group in groupby(layers, key=self._role):
            own = list(group)
            if role != "middle":
                yield Block(self.first if role == "first" else self.last)
                continue
            items = tuple(moved(item, prefix, own[0] - self.template) for item in self.middle)
            stride = -1 if self.backward else 1
            yield Block(items, len(own), prefix, stride) if len(own) > 1 else Block(items)

    def _role(self, layer: int) -> str:
        return {self.span.first: "first", self.span.stop - 1: "last"}.get(layer, "middle")


def of_two_kinds(plain: Program, again: Program, recomputed: int, pipeline: Pipeline) -> Program:
    """The step in which `recomputed` of the model's layers run again. plain, again: Programs of the step in
    which no layer does and in which all do, both put together of equal layers. pipeline: whose parts deal
    them (core/pipeline.py), also where these Programs are of all of its stages. Raises NotPeriodicError, and
    OptionError for more layers than there are."""
    if not (plain.compressed and again.compressed) or plain.layers != again.layers or plain.layers is None:
        raise NotPeriodicError("the two kinds of layers have Programs of other shapes")
    if (plain.holdings, plain.resident) != (again.holdings, again.resident):
        raise NotPeriodicError("what is held differs where layers run again")
    prefix, n_layers = plain.layers
    spans = recomputed_spans(pipeline.spans(n_layers, plain.model), recomputed, plain.model)
    numbers = frozenset(number for span in spans for number in span.indices)
    return replace(
        again,
        settings=replace(again.settings, recompute_layers=recomputed),
        blocks=blocks_of_two_kinds(plain.blocks, again.blocks, prefix, numbers),
    )


def blocks_of_two_kinds(
    plain: Sequence[Block], again: Sequence[Block], prefix: str, recomputed: Collection[int]
) -> tuple[Block, ...]:
    """Those of the step in which the layers of these numbers run again; plain, again: as extended() makes
    them. Raises NotPeriodicError."""
    (rows_plain, end_plain), (rows_again, end_again) = _rows(plain, prefix), _rows(again, prefix)
    if [(row.span, row.backward) for row in rows_plain] != [(row.span, row.backward) for row in rows_again]:
        raise NotPeriodicError("rows of layers come in another order where they run again")
    own = [layer for row in rows_plain for layer in row.met]
    share = sum(layer in recomputed for layer in own), len(own)
    blocks: list[Block] = []
    before = rows_plain[0].met[0] if rows_plain else 0
    for a, b in zip(rows_plain, rows_again, strict=True):
        blocks.append(Block(_gap(a.before, b.before, before in recomputed, share)))
        for runs_again, layers in groupby(a.met, key=lambda layer: layer in recomputed):
            blocks.extend((b if runs_again else a).blocks(list(layers), prefix))
        before = a.met[-1]
    blocks.append(Block(_gap(end_plain, end_again, before in recomputed, share)))
    return tuple(block for block in blocks if block.items)


def but_for_which(item: Item) -> Item:
    """Without which of those alike goes: of the only one left, counted from either end, both are right."""
    return replace(item, nth=0) if isinstance(item, MemoryChange) else item


def _rows(blocks: Sequence[Block], prefix: str) -> tuple[list[_Row], tuple[Item, ...]]:
    """The rows, and what comes after the last one."""
    rows: list[_Row] = []
    done = 0
    for at, block in enumerate(blocks):
        if block.prefix is None:
            continue
        before = tuple(item for gap in blocks[done : at - 1] for item in gap.items)
        head, tail, backward = blocks[at - 1].items, blocks[at + 1].items, block.stride < 0
        one, two = (tail, head) if backward else (head, tail)
        parts = list(stretches_of_layers(two, prefix))
        if len(parts) != 2:
            raise NotPeriodicError(f"{len(parts)} layers at the end of a row")
        cut = parts[1].start
        last = two[:cut] if backward else two[cut:]
        (first,) = stretches_of_layers(one, prefix)
        template = next(stretches_of_layers(block.items, prefix)).layer
        span = Span(first.layer, block.times + 3)
        rows.append(_Row(before, span, backward, one, block.items, template, last))
        done = at + 2
    return rows, tuple(item for gap in blocks[done:] for item in gap.items)


def _gap(
    plain: tuple[Item, ...], again: tuple[Item, ...], runs_again: bool, share: tuple[int, int]
) -> tuple[Item, ...]:
    """What lies between rows of layers: that of the layer before it (of the first row, the one after it),
    which leaves what is freed there."""
    own = again if runs_again else plain
    if len(plain) != len(again):
        return own
    return tuple(_between(a, b, share, one) for a, b, one in zip(plain, again, own, strict=True))


def _between(plain: Item, again: Item, share: tuple[int, int], own: Item) -> Item:
    """What is there under both: of a collective the distance from one that it is kin to grows with each layer
    that runs again."""
    if plain == again or not isinstance(plain, Collective) or not isinstance(again, Collective):
        return own
    gathered = _share(plain.again, again.again, share)
    added_to = _share(plain.added_to, again.added_to, share)
    one, other = (replace(each, again=gathered, added_to=added_to) for each in (plain, again))
    return one if one == other else own


def _share(plain: int | None, again: int | None, share: tuple[int, int]) -> int | None:
    if plain is None and again is None:
        return None
    if plain is None or again is None or (again - plain) * share[0] % share[1]:
        raise NotPeriodicError("a collective's distance doesn't grow layer by layer")
    return plain + (again - plain) * share[0] // share[1]
