"""Constants in the way of a cut: tables that a model makes whole, one entry for each unit of what could be
cut (a slope for each head), and gives to the modules that would cut it. There a rank can take its part of
them, if the dim inside is told apart from the one around: in a second trace."""

from collections.abc import Collection, Iterator

from shardwise.dims.factors import Factor, layout, leaves
from shardwise.dims.record import Apart, Entered, Op, Record, Source, Value
from shardwise.dims.spans import Spans
from shardwise.planner.candidates import Candidate

_OWNED = (Source.PARAMETER, Source.BUFFER, Source.IDS)


def constants_in_the_way(
    record: Record, spans: Spans, found: Collection[Candidate], cut: frozenset[str]
) -> frozenset[Apart]:
    """Arguments of modules to be told apart, of those candidates that have other parameters than are cut."""
    wanted = frozenset(
        each.leaf for each in found if each.obstacles and not each.parameters <= cut
    ) - frozenset(record.sequence)
    return frozenset(_apart(record, spans, wanted))


def _apart(record: Record, spans: Spans, wanted: frozenset[Factor]) -> Iterator[Apart]:
    for at, event in enumerate(record.events):
        if not isinstance(event, Entered):
            continue
        span = spans.around[at][-1]
        for argument, value in event.names.items():
            dims = [dim for dim, each in enumerate(value.dims) if not wanted.isdisjoint(leaves(each))]
            if len(dims) == 1 and _is_constant(value) and _uses(record, span.start, span.stop, value):
                yield Apart(event.module, argument, dims[0])


def _is_constant(value: Value) -> bool:
    return not (value.is_live or value.has_gradient or value.source in _OWNED)


def _uses(record: Record, start: int, stop: int, value: Value) -> bool:
    """Whether the module itself that is called does anything with a tensor that it is given."""
    module = record.events[start]
    assert isinstance(module, Entered)
    inside = (event for event in record.events[start:stop] if isinstance(event, Op))
    return any(op.module == module.module and value in op.inputs for op in inside)


def runs_of(value: Value, dim: int, cut: frozenset[Factor], ranks: int) -> int | None:
    """The length of the runs of which a rank has its part, 0 where the whole dim is one; None where it isn't
    so."""
    pieces = layout(value.dims[dim], cut)
    if not all(piece.parts(ranks) == ranks for piece in pieces) or len({piece.size for piece in pieces}) > 1:
        return None
    return pieces[0].size if len(pieces) > 1 else 0
