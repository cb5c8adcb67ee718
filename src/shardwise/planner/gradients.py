"""Gradients: of each parameter that every rank holds whole, whether a rank's backward gives all of its
gradient or a part of it, once the regions and the cut of the sequence are known."""

from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.dims.factors import Factor
from shardwise.dims.record import Entered, Left, Op, Record, Value
from shardwise.dims.spans import Span, Spans
from shardwise.planner.backward import Kind, Kinds, pass_back
from shardwise.planner.regions import Region, UnfitError
from shardwise.planner.sequence import SequenceCut


class MixedError(UnfitError):
    """A tensor gets a part of its gradient from one of its uses and all of it from another."""

    def __init__(self, value: Value, module: str) -> None:
        self.value, self.module = value, module
        what = value.name or f"a tensor of {list(value.shape)}"
        super().__init__(
            f"{what} gets a part of its gradient from one use and all of it from another, in "
            f"{module or 'the model'}"
        )


@dataclass(frozen=True, slots=True)
class Gradients:
    """Parameter -> Kind, for those that get a gradient. beside: of those in pieces of which ranks have parts
    of some, what their gradient of the others is."""

    of: Mapping[str, str]
    beside: Mapping[str, str]


def gradient_kinds(
    record: Record, spans: Spans, regions: list[Region], sequence: SequenceCut | None
) -> Gradients:
    """Raises MixedError."""
    walk = _Backward(record, spans, regions, sequence)
    return walk.run()


class _Backward:
    def __init__(
        self, record: Record, spans: Spans, regions: list[Region], sequence: SequenceCut | None
    ) -> None:
        self._record, self._spans, self._regions, self._sequence = record, spans, regions, sequence
        self._entries = {name for region in regions for name in region.entries}
        self._kinds = Kinds()
        self._saved: list[dict[Value, set[str]]] = []
        self._at: dict[int, Span] = {span.stop: span for span in spans.all}

    def run(self) -> Gradients:
        assert self._record.logits is not None
        self._kinds.of[self._record.logits].add(Kind.WHOLE)
        events = self._record.events
        for at in range(len(events) - 1, -1, -1):
            match events[at]:
                case Left():
                    self._leave(at)
                case Entered(module):
                    self._enter(module)
                case Op() as op:
                    self._op(at, op)
        return Gradients(self._of_parameters(self._kinds.of), self._of_parameters(self._kinds.beside))

    def _of_parameters(self, kinds: Mapping[Value, set[str]]) -> dict[str, str]:
        return {
            name: self._one(kinds, value, name)
            for name, value in self._record.parameters.items()
            if kinds.get(value)
        }

    def _op(self, at: int, op: Op) -> None:
        for output in op.outputs:
            for kinds in (self._kinds.of, self._kinds.beside):
                if output in kinds:
                    self._one(kinds, output, op.module)
        cut = frozenset[Factor]().union(*(each.candidate.cut_at(self._spans, at) for each in self._regions))
        is_sequence_cut = self._sequence is not None and at in self._sequence.ops
        along = self._record.sequence if is_sequence_cut else frozenset[Factor]()
        parts = set[Value]().union(*(region.parts_at(op, at) for region in self._regions))
        pass_back(op, self._kinds, cut, parts, along)
        if self._sequence is not None and is_sequence_cut:
            for value in self._sequence.steady.intersection(op.inputs):
                if value.has_gradient:  # as long as the part of the sequence that it goes with
                    self._kinds.of[value] = {Kind.PART}

    @staticmethod
    def _one(kinds: Mapping[Value, set[str]], value: Value, module: str) -> str:
        if len(kinds[value]) > 1:
            raise MixedError(value, module)
        return next(iter(kinds[value]), Kind.WHOLE)

    def _leave(self, at: int) -> None:
        """Backwards, a call begins where its module is left: what its inputs get inside is kept apart."""
        span = self._at[at]
        for region in self._regions:
            if at in region.given and span.module in region.inner_ends:
                self._sum_back(span)
        entered = self._entered(span)
        if any(output in entered for output in span.outputs):
            raise MixedError(span.outputs[0], span.module)  # what it gives may be what it was given
        self._saved.append({value: self._kinds.of.pop(value, set()) for value in entered})

    def _sum_back(self, span: Span) -> None:
        """A module that gives a sum over ranks, and sums the parts of its gradient."""
        for output in span.outputs:
            kinds = self._kinds.of.get(output)
            if kinds and kinds != {Kind.PART}:
                raise MixedError(output, span.module)
            if kinds:
                self._kinds.of[output] = {Kind.WHOLE}

    def _entered(self, span: Span) -> list[Value]:
        """The inputs of a call whose gradient is summed there."""
        if span.module not in self._entries or span.input is None:
            return []
        if not any(region.every_input and span.module in region.entries for region in self._regions):
            return [span.input]
        return [value for value in dict.fromkeys(span.inputs) if value.has_gradient and value.is_live]

    def _enter(self, module: str) -> None:
        for value, outside in self._saved.pop().items():
            inside = self._kinds.of.pop(value, set())
            if Kind.WHOLE in inside:
                raise MixedError(value, module)
            if inside or outside:
                self._kinds.of[value] = outside | ({Kind.WHOLE} if inside else set())
