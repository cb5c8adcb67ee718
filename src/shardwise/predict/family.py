"""The Program of a micro-batch of any size, from two that were traced: at 2 and at 3 sequences per rank.

Shapes, bytes, FLOPs, memory and wire bytes are straight lines in the number of sequences b, so two traces
give all. Where they don't stand item by item in the same order, NotAFamilyError: the caller traces each size.
b = 1 is no part of it: a dim of size 1 makes other tensors contiguous, so PyTorch copies elsewhere; trace it
by itself. Nor are programs whose collectives the data decides (`routed`): distinct rows don't grow in a line.
How many rows a masked look-up meets does but for chance; it is rounded to the line through the two batches
that were traced.
"""

from dataclasses import dataclass, replace

from shardwise.core.program import Collective, Item, MemoryChange, Op, Program, TensorSpec

SHORT, LONG = 2, 3


class NotAFamilyError(Exception):
    """The two programs differ in more than sizes; says where."""


@dataclass(frozen=True, slots=True)
class Family:
    """short, long: traced at SHORT and LONG sequences per data-parallel rank, else alike."""

    short: Program
    long: Program

    def __post_init__(self) -> None:
        shapes = [
            [(len(block.items), block.times) for block in program.blocks]
            for program in (self.short, self.long)
        ]
        if shapes[0] != shapes[1]:
            raise NotAFamilyError(f"blocks of {shapes[0]} and {shapes[1]} (items, times)")
        for a, b in zip(_templates(self.short), _templates(self.long), strict=True):
            if isinstance(b, Collective) and b.by_data is not None:
                raise NotAFamilyError(f"token ids decide what {b.module} sends")
            if _key(a) != _key(b):
                raise NotAFamilyError(f"{_key(a)} where {LONG} sequences have {_key(b)}")

    def at(self, sequences: int) -> Program:
        """The Program of `sequences` per data-parallel rank, at least SHORT."""
        if sequences < SHORT:
            raise NotAFamilyError(f"{sequences} sequences: a family begins at {SHORT}")
        line = _Line(sequences)
        blocks = tuple(
            replace(b, items=tuple(map(line.item, a.items, b.items)))
            for a, b in zip(self.short.blocks, self.long.blocks, strict=True)
        )
        settings = self.long.settings
        resident = dict(self.short.resident)
        return replace(
            self.long,
            blocks=blocks,
            settings=replace(settings, batch=line.size(self.short.settings.batch, settings.batch)),
            resident=tuple(
                (kind, line.size(resident.get(kind, n_bytes), n_bytes))
                for kind, n_bytes in self.long.resident
            ),
        )


def _templates(program: Program) -> list[Item]:
    return [item for block in program.blocks for item in block.items]


def _key(item: Item) -> tuple[object, ...]:
    """What an item is, whatever its sizes."""
    match item:
        case Op():
            specs = [(spec.dtype, len(spec.shape)) for spec in (*item.inputs, *item.outputs)]
            return (
                "op",
                item.name,
                item.kind,
                item.phase,
                item.module,
                len(item.inputs),
                specs,
                item.on_host,
            )
        case Collective():
            call = item.call
            return (
                "collective",
                call.kind,
                call.axis,
                call.axis_size,
                call.dtype,
                call.phase,
                item.module,
                item.rule,
                item.by_data is None,
            )
        case MemoryChange():
            return ("memory", item.n_bytes > 0, item.kind, item.phase, item.module, item.maker)


class _Line:
    """Values at `sequences`, from those at SHORT and LONG. Equal tensors and items come out as one object,
    which is quick to compare."""

    def __init__(self, sequences: int) -> None:
        self.more = sequences - LONG
        self.step = LONG - SHORT
        self.specs: dict[tuple[TensorSpec, TensorSpec], TensorSpec] = {}

    def size(self, short: int, long: int) -> int:
        """Never below 0: what the data decides may shrink from one trace to the other."""
        return max(0, long + (long - short) * self.more // self.step)

    def amount(self, short: float, long: float) -> float:
        return max(0.0, long + (long - short) * self.more / self.step)

    def item(self, short: Item, long: Item) -> Item:
        if short is long or short == long:
            return long
        match short, long:
            case Op(), Op():
                return replace(
                    long,
                    inputs=tuple(map(self.spec, short.inputs, long.inputs)),
                    outputs=tuple(map(self.spec, short.outputs, long.outputs)),
                    flops=self.size(short.flops, long.flops),
                    read_bytes=self.size(short.read_bytes, long.read_bytes),
                    write_bytes=self.size(short.write_bytes, long.write_bytes),
                )
            case Collective(), Collective():
                call = replace(
                    long.call,
                    payload_bytes=self.size(short.call.payload_bytes, long.call.payload_bytes),
                    wire_bytes=self.amount(short.call.wire_bytes, long.call.wire_bytes),
                )
                return replace(long, call=call)
            case MemoryChange(), MemoryChange():
                sign = 1 if long.n_bytes >= 0 else -1
                return replace(long, n_bytes=sign * self.size(sign * short.n_bytes, sign * long.n_bytes))
            case _:
                raise NotAFamilyError(f"{_key(short)} and {_key(long)}")

    def spec(self, short: TensorSpec, long: TensorSpec) -> TensorSpec:
        if short == long:
            return long
        found = self.specs.get((short, long))
        if found is None:
            found = self.specs[short, long] = TensorSpec(
                long.dtype, tuple(map(self.size, short.shape, long.shape))
            )
        return found
