"""The Program of a micro-batch of any size, from two that were traced: at 2 and at 3 sequences per rank.

Shapes, bytes, FLOPs, memory and wire bytes are straight lines in the number of sequences b, so two traces
give all. Where they don't stand item by item in the same order, NotAFamilyError: the caller traces each size.
b = 1 is no part of it: a dim of size 1 makes other tensors contiguous, so PyTorch copies elsewhere; trace it
by itself. Nor are programs whose collectives the data decides (`routed`): distinct rows don't grow in a line.
How many rows a masked look-up meets does but for chance; it is rounded to the line through the two batches
that were traced.
"""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from shardwise.core.program import Collective, Item, Program

SHORT, LONG = 2, 3  # neighbours: their difference is the slope


class NotAFamilyError(Exception):
    """The two programs differ in more than sizes; says where."""


@dataclass(frozen=True, slots=True)
class Family:
    """short, long: traced at SHORT and LONG sequences per data-parallel rank, else alike."""

    short: Program
    long: Program

    def __post_init__(self) -> None:
        short, long = ([(len(b.items), b.times) for b in each.blocks] for each in (self.short, self.long))
        if short != long:
            raise NotAFamilyError(f"blocks of {short} and {long} (items, times)")
        for item in (item for block in self.long.blocks for item in block.items):
            if isinstance(item, Collective) and item.by_data is not None:
                raise NotAFamilyError(f"token ids decide what {item.module} sends")
        self.at(LONG)

    def at(self, sequences: int) -> Program:
        """The Program of `sequences` per data-parallel rank, at least SHORT."""
        if sequences < SHORT:
            raise NotAFamilyError(f"{sequences} sequences: a family begins at {SHORT}")
        line, short, long = _Line(sequences), self.short, self.long
        blocks = tuple(
            replace(b, items=tuple(map(line.item, a.items, b.items)))
            for a, b in zip(short.blocks, long.blocks, strict=True)
        )
        settings = replace(long.settings, batch=line.value(short.settings.batch, long.settings.batch))
        before = dict(short.resident)
        resident = tuple((kind, line.value(before.get(kind, held), held)) for kind, held in long.resident)
        return replace(long, blocks=blocks, settings=settings, resident=resident)


class _Line:
    """Values at `sequences`, from those at SHORT and LONG: numbers on their line, all else equal. Equal
    tensors come out as one object, which is quick to compare."""

    def __init__(self, sequences: int) -> None:
        self.more = sequences - LONG
        self.made: dict[tuple[Any, Any], Any] = {}
        self.names: dict[type, tuple[str, ...]] = {}

    def item(self, short: Item, long: Item) -> Item:
        try:
            return self.value(short, long)  # type: ignore[no-any-return]
        except _Differs:
            raise NotAFamilyError(f"{short} where {LONG} sequences have {long}") from None

    def value(self, short: Any, long: Any) -> Any:
        """Never on the other side of 0: what the data decides may shrink from one trace to the other."""
        if short is long or short == long:
            return long
        if type(short) is not type(long):
            raise _Differs
        match long:
            case bool() | str():
                raise _Differs
            case int() | float():
                if short * long < 0:
                    raise _Differs
                moved = long + (long - short) * self.more
                return max(0, moved) if long >= 0 else min(0, moved)
            case tuple() if len(short) == len(long):
                return tuple(map(self.value, short, long))
            case _ if dataclasses.is_dataclass(long):
                if (short, long) not in self.made:
                    self.made[short, long] = self._fields(short, long)
                return self.made[short, long]
            case _:
                raise _Differs

    def _fields(self, short: Any, long: Any) -> Any:
        kind = type(long)
        if kind not in self.names:
            self.names[kind] = tuple(each.name for each in dataclasses.fields(long))
        names = self.names[kind]
        return kind(**{name: self.value(getattr(short, name), getattr(long, name)) for name in names})


class _Differs(Exception):  # noqa: N818
    """In more than a size."""
