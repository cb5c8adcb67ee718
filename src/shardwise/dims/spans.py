"""Spans: the calls of modules in a record, and which of them are around an event."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from shardwise.dims.record import Entered, Left, Op, Record, Value


@dataclass(frozen=True, slots=True)
class Span:
    """One call of a module: its events are [start, stop]. inputs: its tensors, in the order of its
    arguments."""

    module: str
    start: int
    stop: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def input(self) -> Value | None:
        """The activation that a style of its input would change: the first tensor."""
        return self.inputs[0] if self.inputs else None


class Spans:
    """All calls of modules in a record, and which are around an event."""

    def __init__(self, record: Record) -> None:
        self.all: list[Span] = []
        self.around: list[tuple[Span, ...]] = []
        open_: list[tuple[int, Entered]] = []
        stops: dict[int, Span] = {}
        for at, event in enumerate(record.events):
            if isinstance(event, Entered):
                open_.append((at, event))
            elif isinstance(event, Left):
                start, entered = open_.pop()
                span = Span(event.module, start, at, entered.inputs, event.outputs)
                self.all.append(span)
                stops[start] = span
        stack: list[Span] = []
        for at, event in enumerate(record.events):
            if isinstance(event, Entered):
                stack.append(stops[at])
            self.around.append(tuple(stack))
            if isinstance(event, Left):
                stack.pop()
        self._last_use: dict[Value, int] = {}
        for at, event in enumerate(record.events):
            if isinstance(event, Op):
                self._last_use.update(dict.fromkeys(event.inputs, at))
        if record.logits is not None:
            self._last_use[record.logits] = len(record.events)
        self.of: defaultdict[str, list[Span]] = defaultdict(list)
        for span in self.all:
            self.of[span.module].append(span)

    def results(self, span: Span) -> list[Value]:
        """What a call gives that anything uses afterwards."""
        return [value for value in span.outputs if self._last_use.get(value, -1) > span.stop]

    def are_around(self, at: int, modules: Collection[str]) -> bool:
        """Whether an event is inside a call of one of these modules."""
        return any(span.module in modules for span in self.around[at])
