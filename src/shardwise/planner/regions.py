"""Regions: where a cut begins and ends in the modules of a forward, and what each parameter's gradient then
is.

A region is one candidate's: it begins where a tensor that ranks have whole meets a weight of which each has a
part, and ends where a sum over the cut dim leaves a module (a part of a sum on each rank, which the ranks
then add). Going in, the gradient is the part: it is summed where the region's input comes in, once for all
that use it: at the input of the least module that holds the whole region, or else at each module that begins
it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwise.dims.factors import Factor, find, leaves
from shardwise.dims.record import Left, Op, Record, Value
from shardwise.dims.spans import Span, Spans
from shardwise.planner.candidates import Candidate

_ADDITIONS = frozenset({"add", "add_"})


class UnfitError(Exception):
    """Why a candidate's region has no place in the modules that there are. leaves: those that it is about,
    where that is known."""

    def __init__(self, why: str, leaves: frozenset[Factor] = frozenset()) -> None:
        super().__init__(why)
        self.leaves = leaves


@dataclass(slots=True, eq=False)
class Region:
    """begins: modules that make the cut from their whole input; entry: the module at whose input the gradient
    is summed for all of them, None where each does it itself. ends: modules whose output is a part of a
    sum."""

    candidate: Candidate
    begins: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    entry: str | None = None

    @property
    def entries(self) -> list[str]:
        return [self.entry] if self.entry is not None else self.begins


def region_of(record: Record, spans: Spans, candidate: Candidate) -> Region:
    """Where a candidate's cut begins and ends. Raises UnfitError."""
    region = Region(candidate)
    leaf = candidate.leaf
    touched: list[int] = []
    entered: list[int] = []
    for at, event in enumerate(record.events):
        if not isinstance(event, Op) or not _has(event, leaf):
            continue
        if spans.are_around(at, candidate.gathered):
            continue
        touched.append(at)
        if any(find(each) is leaf for factor in event.summed for each in leaves(factor)):
            _add(region.ends, _where_the_sum_leaves(record, spans, at, leaf))
        for value in event.inputs:
            if value.has_gradient and value.is_live and leaf not in set(value.leaves()):
                _add(region.begins, event.module)
                entered.append(at)
    if not touched:
        raise UnfitError("the forward doesn't use it")
    region.entry = _entry(record, spans, region, touched, entered)
    return region


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _has(op: Op, leaf: Factor) -> bool:
    return any(leaf in value.leaves() for value in (*op.inputs, *op.outputs))


def _where_the_sum_leaves(record: Record, spans: Spans, at: int, leaf: Factor) -> str:
    """The module whose output is the part of a sum that the op at `at` makes. Raises UnfitError where
    something uses the part before a module has given it out."""
    op = record.events[at]
    assert isinstance(op, Op)
    parts = set(op.outputs)
    for later in range(at + 1, len(record.events)):
        event = record.events[later]
        if isinstance(event, Left) and parts.intersection(event.outputs):
            return event.module
        if isinstance(event, Op) and parts.intersection(event.inputs):
            own_parameters = all(
                value in parts or (value.has_gradient and not value.is_live) for value in event.inputs
            )
            if event.is_linear and event.inputs[0] in parts and leaf not in _leaves_of(event.inputs[1:]):
                parts.update(event.outputs)
            elif event.name in _ADDITIONS and own_parameters:
                parts.update(event.outputs)  # a bias, which one rank adds
            elif event.name in _ADDITIONS and set(event.inputs) <= parts:
                parts.update(event.outputs)
            else:
                raise UnfitError(
                    f"{event.module or 'the model'} uses a sum over it ({event.name}) before a module "
                    "gives it out"
                )
    raise UnfitError("a sum over it is what the model gives")


def _leaves_of(values: Sequence[Value]) -> set[Factor]:
    return {leaf for value in values for leaf in value.leaves()}


def _entry(
    record: Record, spans: Spans, region: Region, touched: list[int], entered: list[int]
) -> str | None:
    """The module whose input is what all that begin the region use, if whatever else it does with that gives
    a part of the gradient, too: from the one that holds the whole region inwards to the one that holds what
    begins it. None where each that begins it takes its own input."""
    if not entered:
        return None
    outermost = len(_common([_around(spans, at) for at in touched]))
    for module in _common([_around(spans, at) for at in entered])[max(0, outermost - 1) :]:
        if spans.of[module] and all(_takes_it(record, spans, span, region) for span in spans.of[module]):
            return module
    if all(_begins_at_its_input(record, spans, name, region.candidate) for name in region.begins):
        return None
    raise UnfitError("what goes into it is no module's input, so nobody could sum its gradient")


def _around(spans: Spans, at: int) -> tuple[str, ...]:
    return tuple(span.module for span in spans.around[at])


def _takes_it(record: Record, spans: Spans, span: Span, region: Region) -> bool:
    """Whether a call's first tensor is what the region begins with, and its gradient inside is a part."""
    given = [value for value in span.inputs if value.is_live and value.has_gradient]
    if len(given) != 1 or given[0] is not span.input:
        return False
    if region.candidate.leaf in set(given[0].leaves()):
        return False
    return gradients_inside(record, spans, span, region.candidate) == {Kind.PART}


def _common(calls: list[tuple[str, ...]]) -> tuple[str, ...]:
    first, *others = calls
    depth = len(first)
    for other in others:
        same = 0
        while same < min(depth, len(other)) and first[same] == other[same]:
            same += 1
        depth = same
    return first[:depth]


def _begins_at_its_input(record: Record, spans: Spans, module: str, candidate: Candidate) -> bool:
    for span in spans.of[module]:
        if span.input is None:
            return False
        if gradients_inside(record, spans, span, candidate) != {Kind.PART}:
            return False
    return bool(module)


class Kind:
    """What one rank's gradient of a tensor is."""

    WHOLE = "whole"
    PART = "part"


def gradients_inside(record: Record, spans: Spans, span: Span, candidate: Candidate) -> set[str]:
    """What the gradient of a call's input is made of inside the call, where all that it gives has whole
    ones."""
    assert span.input is not None
    kinds: dict[Value, set[str]] = defaultdict(set)
    for output in spans.results(span):
        kinds[output].add(Kind.WHOLE)
    for at in range(span.stop, span.start, -1):
        event = record.events[at]
        if isinstance(event, Op):
            pass_back(event, kinds, candidate.cut_at(spans, at))
    return kinds[span.input]


def pass_back(op: Op, kinds: dict[Value, set[str]], cut: frozenset[Factor]) -> None:
    """What an op's inputs get, from what its outputs got: a part where the op has a cut leaf that the input
    lacks."""
    got = set[str]().union(*(kinds[output] for output in op.outputs if output in kinds))
    if not got:
        return
    own = {leaf for value in (*op.inputs, *op.outputs) for leaf in value.leaves() if leaf in cut}
    for value in op.inputs:
        if not value.has_gradient or any(value is output for output in op.outputs):
            continue
        if value is op.added and any(find(leaf) in cut for factor in op.summed for leaf in leaves(factor)):
            continue  # added once, to the whole sum
        kinds[value] |= {Kind.PART} if own.difference(value.leaves()) else got
