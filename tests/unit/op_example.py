"""What a rule says of an op's dims, and what is so: the op runs on a rank's parts of its inputs, and what it
gives is held against that rank's part of the whole output, or against a part of a sum."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.dims.factors import ConflictError, Factor, layout, leaves
from shardwise.dims.record import Left, Op, Record, SizeUse, Source, Value
from shardwise.dims.sizes import Attribute, Length, evaluate
from shardwise.dims.trace import record_of

RANKS = 2
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Ids:
    """An input of random integers below `below`: data, of which a trace knows nothing."""

    shape: tuple[int, ...]
    below: int


@dataclass(frozen=True, slots=True)
class Mask:
    """An input of random booleans."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A float input that is a buffer: no parameter went into it."""

    shape: tuple[int, ...]


Input = tuple[int, ...] | Ids | Mask | Table


@dataclass(frozen=True, slots=True)
class Places:
    """Where a call's numbers stand in a dim of an input: a rank's call has them where they stand in its
    part."""

    input: int
    dim: int
    at: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """run: (*inputs) -> a tensor or several. says: per input, one letter for each leaf of a dim (more of them
    in brackets): f free, s summed over, b blocked, - one entry. shape: if given, run gets `shape` too: the
    first output's, which a rank writes as its own. places: if given, run gets their numbers as `at`. Of an
    example without these a leaf is cut only where all sizes that the trace has taken down are a rank's,
    too."""

    run: Callable[..., Any]
    inputs: tuple[Input, ...]
    says: str
    shape: tuple[int, ...] | None = None
    places: Places | None = None

    @cached_property
    def traced(self) -> "Traced":
        return _trace(self)

    @cached_property
    def tensors(self) -> Tensors:
        generator = torch.Generator().manual_seed(3)
        return tuple(_tensor(each, generator) for each in self.inputs)

    def on_whole(self) -> Tensors:
        return listed(self.call([tensor.clone() for tensor in self.tensors], self.whole_arguments))

    @property
    def writes_its_own(self) -> bool:
        return self.shape is not None or self.places is not None

    def call(self, tensors: Sequence[Tensor], arguments: dict[str, Any]) -> Any:
        return self.run(*tensors, **arguments)

    @property
    def whole_arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.shape is None else {"shape": self.shape}
        return found | ({} if self.places is None else {"at": self.places.at})

    def on_part(self, leaf: Factor, rank: int) -> Tensors:
        """What a rank gives that has its part of every input with the leaf; of what is added once, only the
        first rank has any."""
        values, added = self.traced.inputs, self.traced.added
        tensors = []
        for value, tensor in zip(values, self.tensors, strict=True):
            is_left_out = rank > 0 and value in added and leaf in self.traced.summed
            own = part(tensor, value, leaf, rank)
            tensors.append(torch.zeros_like(own) if is_left_out else own)
        arguments: dict[str, Any] = {}
        if self.shape is not None:
            arguments["shape"] = tuple(len(own_entries(d, leaf, rank)) for d in self.traced.outputs[0].dims)
        if self.places is not None:
            dim = self.traced.inputs[self.places.input].dims[self.places.dim]
            entries = own_entries(dim, leaf, rank)
            arguments["at"] = tuple(sum(entry < at for entry in entries) for at in self.places.at)
        return listed(self.call(tensors, arguments))


@dataclass(frozen=True)
class Traced:
    """What the trace says of an example's call."""

    record: Record
    ops: tuple[Op, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @cached_property
    def summed(self) -> frozenset[Factor]:
        return frozenset(leaf for op in self.ops for factor in op.summed for leaf in leaves(factor))

    @cached_property
    def blocked(self) -> frozenset[Factor]:
        return frozenset(leaf for op in self.ops for factor, _ in op.blocked for leaf in leaves(factor))

    @property
    def added(self) -> list[Value]:
        return [op.added for op in self.ops if op.added is not None]

    @property
    def is_linear(self) -> bool:
        """Whether the rules say so of all that is done with the first input, op by op."""
        if not self.inputs or not self.ops:
            return False
        reached = [self.inputs[0]]
        for op in self.ops:
            own = [value for value in op.inputs if value in reached]
            if not op.is_linear or own != [op.inputs[0]]:
                return False
            reached = [*reached, *op.outputs]
        return True

    def free(self) -> Iterator[Factor]:
        """The leaves that ranks may each have a part of, where the op's own dims are even."""
        values = (*self.inputs, *self.outputs)
        for leaf in dict.fromkeys(leaf for value in values for leaf in value.leaves()):
            if (
                leaf not in self.blocked
                and leaf.size % RANKS == 0
                and not any(_has_twice(value, leaf) for value in values)
                and not self._is_counted(leaf)
            ):
                yield leaf

    def _is_counted(self, leaf: Factor) -> bool:
        """Whether it is of a tensor of positions, of which no rank makes a part."""
        values = (value for op in self.ops for value in (*op.inputs, *op.outputs))
        return any(value.source is Source.POSITIONS and leaf in set(value.leaves()) for value in values)

    def holds(self, use: SizeUse, leaf: Factor) -> bool:
        """Whether a size that the forward writes is a rank's, too, where a leaf is cut."""
        values = {value.number: value for op in self.ops for value in (*op.inputs, *op.outputs)}

        def dim_of(known: Attribute | Length) -> Factor:
            assert isinstance(known, Length)
            return values[known.tensor].dims[known.dim]

        try:
            own = evaluate(use.size, lambda known: len(own_entries(dim_of(known), leaf, 0)))
            start = evaluate(use.start, lambda known: len(own_entries(dim_of(known), leaf, 0)))
        except ConflictError:
            return False
        before = evaluate(use.start, lambda known: dim_of(known).size)
        expected = sum(entry < before for entry in own_entries(use.of, leaf, 0)) if use.of is not None else 0
        return own == len(own_entries(use.value.dims[use.dim], leaf, 0)) and start == expected

    def says(self) -> str:
        return " ".join("".join(map(self._says, value.dims)) or "." for value in self.inputs)

    def _says(self, dim: Factor) -> str:
        letters = [
            "b" if leaf in self.blocked else "s" if leaf in self.summed else "f" for leaf in leaves(dim)
        ]
        return f"({''.join(letters)})" if len(letters) > 1 else "".join(letters) or "-"


def own_entries(dim: Factor, leaf: Factor, rank: int) -> list[int]:
    """Which entries of a dim a rank has."""
    found, start = list[int](), 0
    for piece in layout(dim, frozenset({leaf})):
        chunk = piece.size // RANKS if piece.is_cut else piece.size
        first = start + (rank * chunk if piece.is_cut else 0)
        found += range(first, first + chunk)
        start += piece.size
    return found


def part(tensor: Tensor, value: Value, leaf: Factor, rank: int) -> Tensor:
    """A rank's part of a tensor."""
    for at, dim in enumerate(value.dims):
        tensor = tensor.index_select(at, torch.tensor(own_entries(dim, leaf, rank), dtype=torch.int64))
    return tensor.clone()


def _has_twice(value: Value, leaf: Factor) -> bool:
    if sum(leaf in set(leaves(dim)) for dim in value.dims) > 1:
        return True
    try:
        for dim in value.dims:
            layout(dim, frozenset({leaf}))
    except ConflictError:
        return True
    return False


class _Call(nn.Module):
    def __init__(self, example: Example) -> None:
        super().__init__()
        self._example = example
        for at, (each, tensor) in enumerate(zip(example.inputs, example.tensors, strict=True)):
            on_meta = tensor.to("meta")
            if isinstance(each, tuple):
                self.register_parameter(f"x{at}", nn.Parameter(on_meta, requires_grad=False))
            else:
                self.register_buffer(f"x{at}", on_meta)

    def forward(self) -> Any:
        tensors = [getattr(self, f"x{at}") for at in range(len(self._example.inputs))]
        return self._example.call(tensors, self._example.whole_arguments)


class _Model(nn.Module):
    def __init__(self, example: Example) -> None:
        super().__init__()
        self.op = _Call(example)

    def forward(self, ids: Tensor) -> Tensor:
        self.op()
        return ids


def _trace(example: Example) -> Traced:
    record = record_of(_Model(example), 16)
    known = {**record.parameters, **record.buffers}
    inputs = tuple(known[f"op.x{at}"] for at in range(len(example.inputs)))
    (left,) = (event for event in record.events if isinstance(event, Left) and event.module == "op")
    return Traced(record, tuple(op for op in record.ops if op.module == "op"), inputs, left.outputs)


def _tensor(each: Input, generator: torch.Generator) -> Tensor:
    match each:
        case Ids(shape, below):
            return torch.randint(below, shape, generator=generator)
        case Mask(shape):
            return torch.rand(shape, generator=generator) > 0.5
        case Table(shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.rand(each, generator=generator, dtype=torch.float64) * 0.8 + 0.1


def listed(out: Any) -> Tensors:
    return (out,) if isinstance(out, Tensor) else tuple(each for each in out if isinstance(each, Tensor))


def complaints(example: Example) -> Iterator[str]:
    """What a rule says and that isn't so."""
    traced = example.traced
    if traced.record.unknown:
        yield f"nobody described {', '.join(traced.record.unknown)}"
    if traced.record.conflicts:
        yield f"conflicts: {', '.join(traced.record.conflicts)}"
    whole = example.on_whole()
    for leaf in traced.free():
        if not example.writes_its_own and not all(traced.holds(use, leaf) for use in traced.record.sizes):
            continue
        try:
            parts = [example.on_part(leaf, rank) for rank in range(RANKS)]
        except (RuntimeError, IndexError) as error:
            yield f"cut over the {leaf}: {error}"
            continue
        for at, (value, expected) in enumerate(zip(traced.outputs, whole, strict=True)):
            given = [each[at] for each in parts]
            if leaf in traced.summed and leaf not in set(value.leaves()):
                if not _is_same(sum(given[1:], given[0]), expected):
                    yield f"output {at}: what ranks give, cut over the {leaf}, doesn't add up to the whole"
                continue
            for rank, own in enumerate(given):
                if not _is_same(own, part(expected, value, leaf, rank)):
                    yield f"output {at}: rank {rank}'s isn't its part of the whole, cut over the {leaf}"
    if traced.is_linear and not _is_linear(example):
        yield "it isn't linear in its first input"


def _is_linear(example: Example) -> bool:
    """Whether a part of a sum goes through it."""
    first, *others = example.tensors
    share = torch.rand(first.shape, generator=torch.Generator().manual_seed(5), dtype=first.dtype) - 0.5
    arguments = example.whole_arguments

    def on(tensor: Tensor) -> Tensors:
        return listed(example.call([tensor.clone(), *(each.clone() for each in others)], arguments))

    return all(
        _is_same(a + b, whole) for a, b, whole in zip(on(share), on(first - share), on(first), strict=True)
    )


def _is_same(given: Any, expected: Tensor) -> bool:
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        return bool((given == expected).all())
    tolerance = 32 * torch.finfo(expected.dtype).eps
    return torch.allclose(given, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
