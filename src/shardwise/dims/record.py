"""Record: what a forward did, as data: tensors with their factors, ops in order, the modules around them, and
where it wrote a size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from shardwise.dims.factors import Factor, leaves
from shardwise.dims.sizes import Expression


class Source(Enum):
    """Where a tensor's entries come from."""

    PARAMETER = auto()
    BUFFER = auto()
    IDS = auto()
    FILLED = auto()  # the same number everywhere: a part of it is made like the whole
    POSITIONS = auto()  # numbers that depend on where they stand, from no other tensor
    OP = auto()


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of the forward. name: a parameter's or buffer's. has_gradient: parameters went into it, and it
    can have one. is_live: so did the ids."""

    number: int
    dims: list[Factor]
    source: Source
    name: str = ""
    has_gradient: bool = False
    is_live: bool = False

    def leaves(self) -> Iterator[Factor]:
        for dim in self.dims:
            yield from leaves(dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)


@dataclass(slots=True, eq=False)
class Op:
    """One op of the dispatcher. summed: factors of inputs that the output has no more, being summed over:
    where ranks have parts of one, the output is a part of a sum. blocked: factors that no rank may have a
    part of, and why. is_linear: a part of a sum in (its first input) gives a part of that sum out. added: an
    input that is added once (a bias)."""

    name: str
    module: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    summed: tuple[Factor, ...] = ()
    blocked: tuple[tuple[Factor, str], ...] = ()
    is_linear: bool = False
    added: Value | None = None


@dataclass(slots=True, eq=False)
class Entered:
    """A module is called with these tensors, in the order of its arguments. names: of those that are an
    argument of its forward by themselves, by the argument's name."""

    module: str
    inputs: tuple[Value, ...]
    names: Mapping[str, Value] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Left:
    """A module has returned these tensors."""

    module: str
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Apart:
    """A dim of a constant tensor that a module takes as its argument `argument`, which is to be one of its
    own inside that module: there ranks may have parts of what they have whole around it."""

    module: str
    argument: str
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class SizeUse:
    """A forward wrote a size: dim `dim` of `value` has `size` entries (and, cut out of a longer one, begins
    at `start` of `of`). at: the event that comes next."""

    function: str
    module: str
    value: Value
    dim: int
    size: Expression
    of: Factor | None = None
    start: Expression = 0
    at: int = 0


Event = Op | Entered | Left


@dataclass(slots=True)
class Record:
    """One forward. unknown: ops that nobody described, with how often. conflicts: dims that an op ties
    together and that can't be the same. apart: arguments as they are inside their module. guesses: where the
    forward read a number out of a tensor whose values a trace hasn't, by module."""

    events: list[Event] = field(default_factory=list)
    sizes: list[SizeUse] = field(default_factory=list)
    parameters: dict[str, Value] = field(default_factory=dict)
    buffers: dict[str, Value] = field(default_factory=dict)
    ids: Value | None = None
    logits: Value | None = None
    unknown: dict[str, int] = field(default_factory=dict)
    conflicts: dict[str, int] = field(default_factory=dict)
    apart: dict[Apart, Value] = field(default_factory=dict)
    guesses: list[str] = field(default_factory=list)

    @property
    def ops(self) -> Iterator[Op]:
        return (event for event in self.events if isinstance(event, Op))

    @property
    def sequence(self) -> frozenset[Factor]:
        """The leaves of the sequence: of the ids' second dim."""
        return frozenset(leaves(self.ids.dims[1])) if self.ids is not None else frozenset()
