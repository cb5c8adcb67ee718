"""Regions: where a cut begins and ends in the modules of a forward, and what each parameter's gradient then
is.

A region is one candidate's: it begins where a tensor that ranks have whole meets a weight of which each has a
part, and ends where a sum over the cut dim leaves a module (a part of a sum on each rank, which the ranks
then add). Going in, the gradient is the part: it is summed where the region's input comes in, once for all
that use it: at the input of the least module that holds the whole region, or else at each module that begins
it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardwise.core.layer_name import any_layer
from shardwise.dims.factors import Factor, is_partly, leaves
from shardwise.dims.record import Left, Op, Record, Source, Value
from shardwise.dims.spans import Span, Spans
from shardwise.planner.backward import PUT_TOGETHER, Kind, Kinds, is_mixed, pass_back
from shardwise.planner.candidates import Candidate

_PRODUCTS = frozenset({"mul", "mul_"})
_ZEROS = frozenset({"zeros", "new_zeros", "zeros_like"})


class UnfitError(Exception):
    """Why a candidate's region has no place in the modules that there are. leaves: those that it is about,
    where that is known."""

    def __init__(self, why: str, leaves: frozenset[Factor] = frozenset()) -> None:
        super().__init__(why)
        self.leaves = leaves


@dataclass(slots=True, eq=False)
class Region:
    """begins: modules that make the cut from their whole input; entry: the module at whose input the gradient
    is summed for all of them, None where each does it itself; every_input: of all tensors that it takes.
    ends: modules whose output is a part of a sum. inner_ends: those whose sum goes on into what is cut, so
    that its gradient is a part, which is summed where they give it. given: the events where sums leave
    modules. parts: tensors that are parts of a sum, until an event.
    added: parameters that are added to such a part (biases). zeros: what the forward fills with zeros."""

    candidate: Candidate
    begins: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    inner_ends: set[str] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    entry: str | None = None
    every_input: bool = False
    parts: dict[Value, int] = field(default_factory=dict)
    zeros: frozenset[Value] = frozenset()
    made_by: Mapping[Value, Op] = field(default_factory=dict)
    added: set[Value] = field(default_factory=set)
    cut: frozenset[Factor] = frozenset()

    def parts_at(self, op: Op, at: int) -> set[Value]:
        """Of what an op takes, the parts of a sum."""
        return {value for value in op.inputs if self.parts.get(value, 0) > at}

    @property
    def entries(self) -> list[str]:
        return [self.entry] if self.entry is not None else self.begins


def region_of(
    record: Record, spans: Spans, candidate: Candidate, cut: frozenset[Factor] = frozenset()
) -> Region:
    """Where a candidate's cut begins and ends. cut: all leaves that are cut. Raises UnfitError."""
    zeros = frozenset(output for op in record.ops if op.name in _ZEROS for output in op.outputs)
    made_by = {output: op for op in record.ops for output in op.outputs}
    region = Region(candidate, zeros=zeros, made_by=made_by, cut=cut | candidate.leaves)
    own = candidate.leaves
    touched: list[int] = []
    entered: list[int] = []
    for at, event in enumerate(record.events):
        if not isinstance(event, Op) or not _has(event, own):
            continue
        if spans.are_around(at, candidate.gathered):
            continue
        touched.append(at)
        summed = own.intersection(leaf for factor in event.summed for leaf in leaves(factor))
        if summed:
            if summed != own:
                raise UnfitError(f"{event.module or 'the model'} sums over a part of it alone")
            _refuse_mixed_sum(event, region)
            _add(region.ends, _where_the_sum_leaves(record, region, at))
            if event.added is not None:
                region.added |= _parameters_in(event.added, event.module, made_by)
        for value in event.inputs:
            if value.has_gradient and value.is_live and own.isdisjoint(value.leaves()):
                _add(region.begins, event.module)
                entered.append(at)
    if not touched:
        raise UnfitError("the forward doesn't use it")
    region.entry = _entry(record, spans, region, touched, entered)
    return region


def place_of(region: Region) -> str:
    """The module that a region lies in, whichever layer: at its entry, or the least that holds all modules
    where it begins and ends."""
    if region.entry is not None:
        return any_layer(region.entry)
    names = [name.split(".") for name in (*region.begins, *region.ends)]
    together = [levels[0] for levels in zip(*names, strict=False) if len(set(levels)) == 1]
    return any_layer(".".join(together))


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _has(op: Op, own: frozenset[Factor]) -> bool:
    return any(not own.isdisjoint(value.leaves()) for value in (*op.inputs, *op.outputs))


def _refuse_mixed_sum(op: Op, region: Region) -> None:
    """What each rank has whole would be added by all of them."""
    for value in op.inputs:
        for dim in value.dims:
            if not region.candidate.leaves.isdisjoint(leaves(dim)) and is_partly(dim, region.cut):
                raise UnfitError(f"{op.module or 'the model'} sums over it and over pieces that stay whole")


def _where_the_sum_leaves(record: Record, region: Region, at: int) -> str:
    """The module whose output is the part of a sum that the op at `at` makes. Raises UnfitError where
    something uses the part before a module has given it out."""
    op = record.events[at]
    assert isinstance(op, Op)
    parts = set(op.outputs)
    for later in range(at + 1, len(record.events)):
        event = record.events[later]
        if isinstance(event, Left) and parts.intersection(event.outputs):
            region.parts.update({part: max(later, region.parts.get(part, 0)) for part in parts})
            region.given.add(later)
            return event.module
        if isinstance(event, Op) and parts.intersection(event.inputs):
            if not _keeps_parts(event, parts, region):
                where = event.module or "the model"
                raise UnfitError(f"{where} uses a sum over it ({event.name}) before a module gives it out")
            parts.update(event.outputs)
    raise UnfitError("a sum over it is what the model gives")


def _keeps_parts(op: Op, parts: set[Value], region: Region) -> bool:
    """Whether an op of parts of a sum gives parts of a sum: what is linear in one of them, or puts them
    together."""
    others = [value for value in op.inputs if value not in parts]
    if not region.candidate.leaves.isdisjoint(_leaves_of(others)):
        return False
    if op.name in PUT_TOGETHER:
        for value in others:
            sources = _parameters_in(value, op.module, region.made_by)
            if value.has_gradient and value not in region.zeros and not sources:
                return False
            region.added |= sources
        return True
    if op.name in _PRODUCTS:
        return len(op.inputs) - len(others) == 1
    return op.is_linear and op.inputs[0] in parts


def _parameters_in(value: Value, module: str, made_by: Mapping[Value, Op]) -> set[Value]:
    """The parameters of which alone a module made a tensor (a bias, or the rows of one that data choose);
    none where there is more to it."""
    if value.source is Source.PARAMETER:
        return {value}
    op = made_by.get(value)
    if op is None or op.module != module:
        return set()
    given = [_parameters_in(each, module, made_by) for each in op.inputs if each.has_gradient]
    return set().union(*given) if all(given) else set()


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
    if all(_begins_at_its_input(record, spans, name, region) for name in region.begins):
        return None
    raise UnfitError("what goes into it is no module's input, so nobody could sum its gradient")


def _around(spans: Spans, at: int) -> tuple[str, ...]:
    return tuple(span.module for span in spans.around[at])


def _takes_it(record: Record, spans: Spans, span: Span, region: Region) -> bool:
    """Whether the gradient of all that a call takes is a part, inside."""
    given = [value for value in span.inputs if value.is_live and value.has_gradient]
    if not given or given[0] is not span.input or len(set(given)) < len(given):
        return False
    if any(not region.cut.isdisjoint(value.leaves()) for value in given):
        return False
    inside, inner = gradients_inside(record, spans, span, region)
    if any(inside.get(value, {Kind.PART}) != {Kind.PART} for value in given) or given[0] not in inside:
        return False
    region.every_input |= len(given) > 1
    region.inner_ends |= inner
    return True


def _common(calls: list[tuple[str, ...]]) -> tuple[str, ...]:
    first, *others = calls
    depth = len(first)
    for other in others:
        same = 0
        while same < min(depth, len(other)) and first[same] == other[same]:
            same += 1
        depth = same
    return first[:depth]


def _begins_at_its_input(record: Record, spans: Spans, module: str, region: Region) -> bool:
    for span in spans.of[module]:
        if span.input is None:
            return False
        inside, _ = gradients_inside(record, spans, span, region)
        if inside.get(span.input) != {Kind.PART}:
            return False
    return bool(module)


def gradients_inside(
    record: Record, spans: Spans, span: Span, region: Region
) -> tuple[Mapping[Value, set[str]], set[str]]:
    """(what the gradients of tensors are made of inside a call, where all that it gives has whole ones, or of
    pieces beside what is cut a part; the modules inside that give a sum whose gradient is a part)"""
    kinds, inner = Kinds(), set[str]()
    for output in spans.results(span):
        kinds.of[output].add(Kind.WHOLE)
        if is_mixed(output, region.cut):
            kinds.beside[output].add(Kind.PART)
    for at in range(span.stop, span.start, -1):
        event = record.events[at]
        if isinstance(event, Op):
            pass_back(event, kinds, region.candidate.cut_at(spans, at), region.parts_at(event, at))
        elif isinstance(event, Left) and at in region.given:
            sums = [value for value in event.outputs if kinds.of.get(value) == {Kind.PART}]
            if sums:
                inner.add(event.module)
            kinds.of.update((value, {Kind.WHOLE}) for value in sums)
    return kinds.of, inner
