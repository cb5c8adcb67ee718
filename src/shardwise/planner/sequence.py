"""Sequence parallelism: between the first layer and the head each rank has its part of every sequence. What
of the forward allows that, which modules need the whole sequence, and which are then computed whole on every
rank.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from shardwise.core.layer_name import any_layer
from shardwise.dims.factors import Factor, leaves
from shardwise.dims.record import Entered, Left, Op, Record, Source, Value
from shardwise.dims.sizes import lengths_in
from shardwise.dims.spans import Spans
from shardwise.planner.regions import Region, UnfitError

_TRIES = 40


@dataclass(slots=True)
class SequenceCut:
    """begins: the module whose input is cut; ends: the one whose input is whole again (the head, if it can
    be); is_at_embedding: the look-up gives the part itself. whole: modules that gather their input and run
    whole. covered: those that are called from there to the head. steady: tensors that are the same along it.
    ops: where ops have a part of the sequence, by their place in the record."""

    begins: str
    ends: str
    head: str
    is_at_embedding: bool = False
    whole: set[str] = field(default_factory=set)
    ops: set[int] = field(default_factory=set)
    covered: frozenset[str] = frozenset()
    steady: frozenset[Value] = frozenset()

    def is_cut_around(self, module: str) -> bool:
        """Whether what a module takes and gives is a part of the sequence, if it isn't told otherwise."""
        is_inside_whole = any(module.startswith(f"{each}.") for each in self.whole)
        return module in self.covered and not is_inside_whole


@dataclass(frozen=True, slots=True)
class _NeedsWholeError(Exception):
    """An op that needs the whole sequence where each rank has a part of it."""

    at: int
    why: str


def cut_sequence(record: Record, spans: Spans, regions: list[Region], layers: str, head: str) -> SequenceCut:
    """Where the sequence can be cut. layers: the name of their list. Raises UnfitError where it can't be."""
    first_layer = f"{layers}.0"
    if not spans.of[first_layer]:
        raise UnfitError(f"its forward doesn't call {first_layer}")
    refusal = UnfitError("nothing comes after its layers")
    for end in (head, *_after(spans, layers, head)):
        try:
            return _cut_until(record, spans, regions, first_layer, end, head)
        except UnfitError as error:
            refusal = error
    raise refusal


def _after(spans: Spans, layers: str, head: str) -> list[str]:
    """The modules that are called between the last layer and the head, the last first: where the sequence can
    be gathered if the way from there to the head can't take a part of it."""
    last = max(span.stop for span in spans.all if span.module.startswith(f"{layers}."))
    until = spans.of[head][-1].start
    between = [span for span in spans.all if last < span.start and span.stop < until]
    outermost = [
        span for span in between if not any(o.start < span.start and span.stop < o.stop for o in between)
    ]
    return [span.module for span in sorted(outermost, key=lambda each: -each.start) if len(span.inputs) == 1]


def _cut_until(
    record: Record, spans: Spans, regions: list[Region], first_layer: str, end: str, head: str
) -> SequenceCut:
    entries = {name for region in regions for name in region.entries} | {end}
    ends = {name for region in regions for name in region.ends if name not in region.inner_ends}
    first, last = spans.of[first_layer][0], spans.of[end][-1]
    covered = frozenset(span.module for span in spans.all if first.start <= span.start <= last.start)
    cut = frozenset[Factor]().union(*(region.candidate.leaves for region in regions))
    found = SequenceCut(first_layer, end, head, covered=covered, steady=frozenset(_steady(record)))
    for _ in range(_TRIES):
        try:
            found.ops = _Walk(record, spans, entries, ends, found).run()
        except _NeedsWholeError as error:
            module = _to_be_whole(spans, cut, error, found, entries)
            alike = {name for name in spans.of if any_layer(name) == any_layer(module)}
            found.whole |= alike - entries
            found.whole -= {
                name for name in found.whole if any(name.startswith(f"{o}.") for o in found.whole)
            }
        else:
            found.is_at_embedding = _is_embedded_directly(record, spans, first_layer)
            return found
    raise UnfitError("too many of its modules need the whole sequence")


class _Walk:
    """One pass over the record with what is cut known."""

    def __init__(
        self, record: Record, spans: Spans, entries: set[str], ends: set[str], found: SequenceCut
    ) -> None:
        self._record, self._spans = record, spans
        self._entries, self._ends, self._found = entries, ends, found
        self._sequence = record.sequence
        self._cut: set[Value] = set()
        self._ops: set[int] = set()
        self._steady = found.steady
        self._restored: list[Value | None] = []
        self._sizes = _sizes_of_sequence(record)
        self._asked_of: defaultdict[int, list[Value]] = defaultdict(list)
        for _, asked, when in (each for uses in self._sizes.values() for each in uses):
            self._asked_of[when].append(asked)
        self._was_cut: dict[tuple[Value, int], bool] = {}

    def run(self) -> set[int]:
        first = self._spans.of[self._found.begins][0]
        if first.input is None:
            raise UnfitError(f"{self._found.begins} is called without a tensor")
        for at, event in enumerate(self._record.events):
            self._check_sizes(at)
            if at == first.start:
                self._cut.add(first.input)
            match event:
                case Entered():
                    self._enter(at, event)
                case Left():
                    self._leave(at, event)
                case Op():
                    self._op(at, event)
        return self._ops

    def _is_in_place(self, value: Value) -> bool:
        """[B, S, ...], which styles gather and cut in dim 1."""
        return len(value.dims) > 1 and frozenset(leaves(value.dims[1])) == self._sequence

    def _before(self, at: int) -> int:
        """The event before the call that ends at `at`."""
        return max(0, self._spans.around[at][-1].start - 1)

    def _check_sizes(self, at: int) -> None:
        """A length that was asked of one tensor and is written for another: both must be cut, or neither."""
        for value in self._asked_of.get(at, ()):
            self._was_cut[value, at] = value in self._cut
        for value, asked, when in self._sizes.get(at, ()):
            if (value in self._cut) != self._was_cut[asked, when]:
                raise _NeedsWholeError(at - 1, "it writes the length of another tensor")

    def _has_sequence(self, value: Value) -> bool:
        return not self._sequence.isdisjoint(value.leaves())

    def _enter(self, at: int, event: Entered) -> None:
        taken = None
        if event.module in self._entries or event.module in self._found.whole:
            inputs = [value for value in event.inputs if value in self._cut]
            if len(inputs) > 1:
                raise _NeedsWholeError(at - 1, f"{event.module} takes the cut sequence twice")
            if inputs and inputs[0] is event.inputs[0]:
                taken = inputs[0]
                if not self._is_in_place(taken):
                    raise _NeedsWholeError(
                        at - 1, f"{event.module} takes sequences that are no dim of their own"
                    )
                self._cut.discard(taken)
            elif inputs:
                raise _NeedsWholeError(
                    at - 1, f"the sequence isn't the first tensor that {event.module} takes"
                )
        self._restored.append(taken)

    def _leave(self, at: int, event: Left) -> None:
        taken = self._restored.pop()
        if taken is not None and event.module != self._found.ends:
            self._cut.add(taken)
        if event.module in self._ends and self._found.is_cut_around(event.module):
            self._cut.update(value for value in event.outputs if value.is_live)
        elif event.module in self._found.whole and taken is not None:
            live = [value for value in event.outputs if value.is_live and self._has_sequence(value)]
            if live and not self._is_in_place(live[0]):
                raise _NeedsWholeError(
                    self._before(at), f"{event.module} gives sequences that are no dim of their own"
                )
            self._cut.update(live[:1])

    def _op(self, at: int, op: Op) -> None:
        cut = [value for value in op.inputs if value in self._cut]
        if not cut:
            return
        self._ops.add(at)
        for value in op.inputs:
            if value not in self._cut and self._has_sequence(value) and value not in self._steady:
                raise _NeedsWholeError(at, f"{op.name} takes a whole sequence beside a part of one")
        for factor, why in op.blocked:
            if not self._sequence.isdisjoint(leaves(factor)) and self._is_of(factor, cut):
                raise _NeedsWholeError(at, why)
        if any(not self._sequence.isdisjoint(leaves(factor)) for factor in op.summed):
            raise _NeedsWholeError(at, f"{op.name} sums over it")
        for output in op.outputs:
            if self._has_sequence(output):
                self._cut.add(output)
            else:
                raise _NeedsWholeError(at, f"{op.name} gives a tensor without it")

    @staticmethod
    def _is_of(factor: Factor, values: list[Value]) -> bool:
        own = set(leaves(factor))
        return any(not own.isdisjoint(value.leaves()) for value in values)


def _steady(record: Record) -> set[Value]:
    """Tensors that are the same along the sequence, whatever its length: filled ones, and what is
    expanded."""
    sequence = record.sequence
    found: set[Value] = set()
    for op in record.ops:
        long = [value for value in op.inputs if not sequence.isdisjoint(value.leaves())]
        is_counted = any(not sequence.isdisjoint(leaves(factor)) for factor, _ in op.blocked)
        for output in op.outputs:
            is_made = output.source is Source.FILLED or (output.source is Source.OP and bool(op.inputs))
            if is_made and not output.is_live and not is_counted and found.issuperset(long):
                found.add(output)
    return found


def _to_be_whole(
    spans: Spans, cut: frozenset[Factor], violation: _NeedsWholeError, found: SequenceCut, entries: set[str]
) -> str:
    """The module that gets the whole sequence, since one of its ops needs it."""
    around = spans.around[violation.at]
    for span in reversed(around):
        is_layer = span.module == found.begins or any_layer(span.module) == any_layer(found.begins)
        if is_layer or not span.module or found.begins.startswith(f"{span.module}."):
            break
        gives_parts = any(
            not cut.isdisjoint(value.leaves())
            for each in spans.of[span.module]
            for value in spans.results(each)
        )
        if span.module not in entries and span.module not in found.whole and not gives_parts:
            return span.module
    where = (around[-1].module if around else "") or "the model"
    raise UnfitError(f"{violation.why}, in {where}, where each rank has a part of the sequence")


def _is_embedded_directly(record: Record, spans: Spans, first_layer: str) -> bool:
    """Whether what a look-up gives goes into the first layer as it is and nowhere else before, and nobody
    asks how long it is."""
    (first, *_) = spans.of[first_layer]
    taken = first.input
    assert taken is not None
    before = [event for event in record.events[: first.start] if isinstance(event, Op)]
    is_looked_up = any(op.name == "embedding" and taken in op.outputs for op in before)
    is_used = any(taken in op.inputs for op in before)
    lengths = (
        length for use in record.sizes for size in (use.size, use.start) for length in lengths_in(size)
    )
    asks = any(length.tensor == taken.number for length in lengths)
    return is_looked_up and not is_used and not asks


def _sizes_of_sequence(record: Record) -> dict[int, list[tuple[Value, Value, int]]]:
    """By the event that comes next: (a tensor whose length was written, the tensor that was asked for it,
    when)."""
    values = {value.number: value for op in record.ops for value in (*op.inputs, *op.outputs)}
    if record.ids is not None:
        values[record.ids.number] = record.ids
    found: dict[int, list[tuple[Value, Value, int]]] = {}
    for use in record.sizes:
        if record.sequence.isdisjoint(leaves(use.value.dims[use.dim])) or not use.value.is_live:
            continue
        for length in lengths_in(use.size):
            asked = values.get(length.tensor)
            if asked is not None and not record.sequence.isdisjoint(leaves(asked.dims[length.dim])):
                found.setdefault(use.at, []).append((use.value, asked, length.at))
    return found
