"""Candidates: what of a model could be cut, what cutting it would cost, and why some of it can't be.

A candidate is a leaf: what its dims tie together (all heads of one layer's attention, the inner width of its
feed-forward). Cutting it cuts every tensor that has it. Each sum over it that the forward takes is then a sum
over ranks: the cost.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardwise.core.layer_name import any_layer
from shardwise.dims.by_data import BY_ID
from shardwise.dims.factors import ConflictError, Factor, Piece, find, layout, leaves
from shardwise.dims.record import Op, Record, Source, Value
from shardwise.dims.spans import Spans

# a weight of less than 1 / this of what a cut would cut may stay whole for it
_SMALL = 20


@dataclass(slots=True, eq=False)
class Candidate:
    """members: (parameter, dim) that have it. sums: elements of partial sums that cutting it leaves, at the
    real sequence length. obstacles: why it can't be cut; each a reason. gathered: modules that need all of it
    (they take statistics over it), and its pieces in their last dim, where those are several: they gather it,
    run whole, and give their part of what they make. inner: what is cut with it, right inside it, where it
    has fewer entries than there are ranks (few KV heads, and the query heads that share one): ranks then
    share out both together."""

    leaf: Factor
    inner: Factor | None = None
    members: list[tuple[str, int]] = field(default_factory=list)
    sums: float = 0.0
    obstacles: list[str] = field(default_factory=list)
    gathered: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def cut_at(self, spans: Spans, at: int) -> frozenset[Factor]:
        """The leaf, where it is cut at an event of the record."""
        return frozenset() if spans.are_around(at, self.gathered) else self.leaves

    @property
    def leaves(self) -> frozenset[Factor]:
        """All that is cut together: itself, and its inner."""
        return frozenset({self.leaf} if self.inner is None else {self.leaf, self.inner})

    @property
    def size(self) -> int:
        """How many parts it can be cut in."""
        return self.leaf.size * (1 if self.inner is None else self.inner.size)

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.members)


def candidates(
    record: Record, spans: Spans, ranks: int, *, seq: int, inner: Mapping[Factor, Factor] | None = None
) -> list[Candidate]:
    """All of a forward's, obstacles and costs known. seq: the length that the model will see. inner: of
    leaves that have one, see Candidate.

    What cutting a leaf costs is each sum over it that the forward takes, and for each tensor without it that
    enters what has it the sum of that tensor's gradient.
    """
    found = _members(record, inner or {})
    _note_obstacles(record, spans, found, ranks)
    _note_sums(record, spans, found, seq)
    return list(dict.fromkeys(found.values()))


def choose(record: Record, found: list[Candidate]) -> list[Candidate]:
    """The candidates to cut: the fewest elements of sums for each parameter element that is cut; no parameter
    twice, and no tensor in two of its dims."""
    sizes = {name: math.prod(value.shape) for name, value in record.parameters.items()}
    together = _tensors_of(record)
    chosen: list[Candidate] = []
    covered: set[str] = set()
    possible = [each for each in found if not each.obstacles]

    def price(each: Candidate) -> float:
        return each.sums / sum(sizes[name] for name in each.parameters)

    for candidate in sorted(possible, key=lambda each: (price(each), -each.leaf.size)):
        new = candidate.parameters - covered
        gain = sum(sizes[name] for name in new)
        if gain < 0.5 * sum(sizes[name] for name in candidate.parameters):
            continue
        mine = set[int]().union(*(together[leaf] for leaf in candidate.leaves))
        if any(mine & together[leaf] for other in chosen for leaf in other.leaves):
            continue
        chosen.append(candidate)
        covered |= candidate.parameters
    return chosen


def pattern_of(record: Record, candidate: Candidate) -> frozenset[tuple[str, int, tuple[Piece, ...]]]:
    """The same for a candidate in every layer: its dims, and where it lies in them (groups, and the heads of
    each)."""
    found, leaf = [], frozenset({candidate.leaf})
    for name, dim in candidate.members:
        try:
            pieces = tuple(layout(record.parameters[name].dims[dim], leaf))
        except ConflictError:
            pieces = ()
        found.append((any_layer(name), dim, pieces))
    return frozenset(found)


def _members(record: Record, inner: Mapping[Factor, Factor]) -> dict[Factor, Candidate]:
    found: dict[Factor, Candidate] = {}
    for leaf, within in inner.items():
        found[leaf] = found[within] = Candidate(leaf, within)
    for name, value in record.parameters.items():
        for dim, factor in enumerate(value.dims):
            for leaf in dict.fromkeys(leaves(factor)):
                members = found.setdefault(leaf, Candidate(leaf)).members
                if (name, dim) not in members:
                    members.append((name, dim))
    return found


def _tensors_of(record: Record) -> defaultdict[Factor, set[int]]:
    """The tensors that have a leaf, by number."""
    found: defaultdict[Factor, set[int]] = defaultdict(set)
    for value in _values(record):
        for leaf in value.leaves():
            found[leaf].add(value.number)
    return found


def _values(record: Record) -> Iterator[Value]:
    yield from record.parameters.values()
    for op in record.ops:
        yield from op.outputs


def _note_obstacles(record: Record, spans: Spans, found: dict[Factor, Candidate], ranks: int) -> None:
    sequence = record.sequence
    batch = frozenset(leaves(record.ids.dims[0])) if record.ids is not None else frozenset()
    for leaf, candidate in found.items():
        if leaf in sequence or leaf in batch:
            candidate.obstacles.append("it is the batch's or the sequence's")
        if candidate.size % ranks:
            candidate.obstacles.append(f"{ranks} ranks don't divide its {leaf.size}")
    for op in record.ops:
        for factor, why in op.blocked:
            if why != BY_ID:
                for leaf in leaves(factor):
                    if not _gathers(spans, op.module, found.get(find(leaf))):
                        _note(found, leaf, f"{why} ({_place(op)})")
        for value in op.inputs:
            if value.source in (Source.POSITIONS, Source.BUFFER) and not is_own_buffer(value, op.module):
                what = f"buffer {value.name}" if value.name else "a table of positions"
                for leaf in value.leaves():
                    _note(found, leaf, f"{what} has it whole ({_place(op)})")
        for value in (*op.inputs, *op.outputs):
            _note_twice(record, spans, found, op.module, value)
            _note_apart(found, value)
    if record.logits is not None:
        for leaf in leaves(record.logits.dims[-1]):
            found.pop(leaf, None)  # the vocabulary, which the head's own rule cuts


def is_own_buffer(value: Value, module: str) -> bool:
    """Whether a tensor is a buffer of the module itself, of which a rank's rule can give it the part."""
    return value.source is Source.BUFFER and bool(value.name) and value.name.rpartition(".")[0] == module


def _is_small(record: Record, candidate: Candidate | None, value: Value) -> bool:
    """Whether a tensor is small beside the parameters that a cut would cut."""
    names = candidate.parameters if candidate is not None else ()
    total = sum(math.prod(record.parameters[name].shape) for name in names)
    return math.prod(value.shape) * _SMALL < total


def _gathers(spans: Spans, module: str, candidate: Candidate | None) -> bool:
    """Whether a module without others inside takes and gives the candidate as its last dim, and so can have
    all of it for the time of its call. Takes note of it."""
    if candidate is None or candidate.inner is not None or not module:
        return False
    if any(name.startswith(f"{module}.") for name in spans.of):
        return False
    layouts: list[list[Piece]] = []
    for span in spans.of[module]:
        for value in (*span.inputs, *span.outputs):
            own = [dim for dim in value.dims if candidate.leaf in set(leaves(dim))]
            is_last = bool(own) and own[0] is value.dims[-1] and len(own) == 1
            if not is_last:
                return False
            pieces = layout(own[0], frozenset({candidate.leaf}))
            layouts.append(pieces if len(pieces) > 1 else [])
            if not all(piece.is_cut for piece in pieces) or layouts[0] != layouts[-1]:
                return False
        alike = {tuple(value.shape) for value in span.inputs}  # the style gathers what has the first's shape
        if len(alike) != 1 or len(span.outputs) != 1:
            return False
    candidate.gathered[module] = tuple(piece.size for piece in layouts[0])
    return True


def _note(found: dict[Factor, Candidate], leaf: Factor, why: str) -> None:
    candidate = found.get(find(leaf))
    if candidate is not None and why not in candidate.obstacles:
        candidate.obstacles.append(why)


def _note_twice(
    record: Record, spans: Spans, found: dict[Factor, Candidate], module: str, value: Value
) -> None:
    """A leaf that a tensor has in two of its dims, or a dim in two factors of one product. A small weight
    that has it so (a gate of each head made of all heads) stays whole, and its module gathers."""
    own = [leaf for dim in value.dims for leaf in dict.fromkeys(leaves(dim))]
    for leaf in {leaf for leaf in own if own.count(leaf) > 1}:
        candidate = found.get(find(leaf))
        if not (_is_small(record, candidate, value) and _gathers(spans, module, candidate)):
            _note(found, leaf, "a tensor has it in two of its dims")
    for dim in value.dims:
        for leaf in dict.fromkeys(leaves(dim)):
            try:
                layout(dim, frozenset({leaf}))
            except ConflictError:
                _note(found, leaf, "one dim has it twice")


def _note_apart(found: dict[Factor, Candidate], value: Value) -> None:
    """What lies between a leaf and its inner, or an inner without its leaf: no rank's part is a chunk."""
    for dim in value.dims:
        own = set(leaves(dim))
        for candidate in {found[leaf] for leaf in own if leaf in found and found[leaf].inner is not None}:
            try:
                layout(dim, candidate.leaves)
            except ConflictError:
                _note(found, candidate.leaf, "one dim has its parts apart")
    everything = set(value.leaves())
    for leaf in everything:
        candidate_ = found.get(leaf)
        if candidate_ is not None and leaf is candidate_.inner and candidate_.leaf not in everything:
            _note(found, leaf, "a tensor has a part of it alone")


def _place(op: Op) -> str:
    return f"{op.name} in {op.module or 'the model'}"


def _note_sums(record: Record, spans: Spans, found: dict[Factor, Candidate], seq: int) -> None:
    sequence = record.sequence
    entered: set[tuple[Factor, frozenset[Factor]]] = set()
    for candidate in dict.fromkeys(found.values()):
        for module in candidate.gathered:
            # gathered on the way in, and its gradient on the way back
            taken = (value for span in spans.of[module] for value in span.inputs)
            candidate.sums += sum(2 * _elements(value, sequence, seq) for value in taken)
    for at, op in enumerate(record.events):
        if not isinstance(op, Op):
            continue
        summed = {find(leaf) for factor in op.summed for leaf in leaves(factor)}
        for candidate in {found[leaf] for leaf in summed if leaf in found}:
            if op.outputs and candidate.cut_at(spans, at):
                candidate.sums += _elements(op.outputs[0], sequence, seq)
        own = {leaf for value in (*op.inputs, *op.outputs) for leaf in value.leaves() if leaf in found}
        own = {leaf for leaf in own if found[leaf].cut_at(spans, at)}
        for value in op.inputs:
            if not value.has_gradient or not value.is_live:
                continue
            # one gradient is summed once, however many projections of one input it comes from
            dims = frozenset(value.leaves())
            for leaf in own - dims:
                if (leaf, dims) not in entered:
                    entered.add((leaf, dims))
                    found[leaf].sums += _elements(value, sequence, seq)


def _elements(value: Value, sequence: frozenset[Factor], seq: int) -> float:
    """Elements of a tensor where the sequence is `seq` long."""
    total = 1.0
    for dim in value.dims:
        own = math.prod(leaf.size for leaf in leaves(dim) if leaf in sequence)
        total *= dim.size / own * seq if own > 1 else dim.size
    return total
