"""Rules: what regions, the cut sequence and the counts mean for each module of the traced model, as styles of
a plan."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from shardwise.core.argument_cut import ArgumentCut
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import Style, StyleName
from shardwise.dims.factors import Factor, Piece, layout, leaves
from shardwise.dims.record import Op, Record, Value
from shardwise.planner.backward import Kind
from shardwise.planner.constants import runs_of
from shardwise.planner.counts import Count, pieces_and_parts
from shardwise.planner.gradients import Gradients
from shardwise.planner.names import Names
from shardwise.planner.regions import Region, UnfitError
from shardwise.planner.sequence import SequenceCut


@dataclass(frozen=True, slots=True)
class Reasoned:
    """A style, and why."""

    style: Style
    why: str


@dataclass(slots=True)
class Cuts:
    """All that was decided of a traced model. table: the modules that look ids up; head: the one that makes
    the logits. alone: the modules that are cut alone, see cut_alone()."""

    record: Record
    model: nn.Module
    regions: list[Region]
    sequence: SequenceCut | None
    counts: frozenset[Count]
    gradients: Gradients
    table: tuple[str, ...]
    head: str | None
    table_style: Style
    head_output: Placement
    ranks: int
    names: Names
    alone: Mapping[str, Reasoned] = field(default_factory=dict)
    leaves: frozenset[Factor] = field(init=False)
    of_head: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = frozenset[Factor]().union(*(region.candidate.leaves for region in self.regions))
        self.of_head = dict(_read_by_head(self))

    def cut_in(self, module: str) -> frozenset[Factor]:
        """The leaves that are cut inside a module's call."""
        inside = (each.candidate for each in self.regions if module not in each.candidate.gathered)
        return frozenset[Factor]().union(*(candidate.leaves for candidate in inside))

    def around(self, module: str) -> Placement:
        """What a module takes and gives, if it isn't told otherwise: a part of the sequence, or all."""
        is_cut = self.sequence is not None and self.sequence.is_cut_around(module)
        return Shard(1) if is_cut else Replicate()


def rules_of(cuts: Cuts) -> dict[str, Reasoned]:
    """The style of every module of the traced model that needs one. Raises UnfitError for what no style
    says."""
    users = users_of(cuts)
    counts: defaultdict[str, list[str]] = defaultdict(list)
    for count in sorted(cuts.counts, key=lambda each: each.attribute.name):
        counts[count.attribute.module].append(count.said(cuts.ranks))
    found: dict[str, Reasoned] = {}
    for name, module in cuts.model.named_modules():
        rule = _rule(cuts, name, module, users, tuple(counts.get(name, ())))
        arguments = _arguments(cuts, name)
        if arguments:
            rule = _with_arguments(rule, name, arguments)
        if rule is not None:
            found[name] = rule
    return found


def _arguments(cuts: Cuts, module: str) -> tuple[tuple[str, ArgumentCut], ...]:
    """The constants that a module is given whole and of which it takes a part. Raises UnfitError where the
    part is no even one."""
    found, cut = [], cuts.cut_in(module)
    for each, value in cuts.record.apart.items():
        own = cut.intersection(leaves(value.dims[each.dim]))
        if each.module != module or not own:
            continue
        every = runs_of(value, each.dim, cut, cuts.ranks)
        if every is None:
            raise UnfitError(f"{module} is given {each.argument}, of which a rank's part is in pieces", own)
        found.append((each.argument, ArgumentCut(each.dim, every)))
    return tuple(found)


def _with_arguments(
    rule: Reasoned | None, module: str, arguments: tuple[tuple[str, ArgumentCut], ...]
) -> Reasoned:
    if rule is None or rule.style == Style(StyleName.REPLICATE):
        return Reasoned(Style(StyleName.LOCAL, cut=arguments), "takes its part of what it is given whole")
    if "cut" not in rule.style.name.arguments:
        raise UnfitError(f"{module} is given {arguments[0][0]} whole, and needs a part of it")
    return Reasoned(replace(rule.style, cut=arguments), rule.why)


def held(cuts: Cuts, name: str) -> Held:
    """How a parameter, or a buffer that is cut, is held."""
    value = cuts.record.parameters.get(name) or cuts.record.buffers[name]
    if name in cuts.of_head:
        return Held(Shard(cuts.of_head[name]))
    if name.rpartition(".")[0] in cuts.alone:
        return Held(Shard(0))
    cut = cut_dim(value, cuts.cut_in(name.rpartition(".")[0]))
    if cut is None:
        return Held(Replicate(), gradient=Partial() if kind_of(cuts, name) == Kind.PART else None)
    dim, pieces = cut
    if cuts.gradients.beside.get(name, Kind.PART) != Kind.PART:
        own = cuts.leaves.intersection(value.leaves())
        raise UnfitError(f"{name} has rows of which each rank computes all of the gradient", own)
    sizes, parts = pieces_and_parts(pieces, cuts.ranks)
    is_shared = name not in cuts.gradients.beside and any(1 < count < cuts.ranks for count in parts)
    if is_shared and cuts.gradients.of.get(name, Kind.PART) != Kind.PART:
        own = cuts.leaves.intersection(value.leaves())
        raise UnfitError(f"{name} is shared by ranks of which each computes all of its gradient", own)
    return Held(Shard(dim), sizes, parts=parts)


def kind_of(cuts: Cuts, name: str) -> str:
    """What one rank's gradient of a whole parameter is; of one that gets none, what the modules around it
    have. Inside a look-up each rank runs the ids of its own rows alone."""
    if any(name.startswith(f"{table}.") for table in cuts.table):
        return Kind.PART
    is_inside = any(region.entry and name.startswith(f"{region.entry}.") for region in cuts.regions)
    return cuts.gradients.of.get(name, Kind.PART if is_inside else Kind.WHOLE)


def cut_dim(value: Value, cut: frozenset[Factor]) -> tuple[int, list[Piece]] | None:
    """The dim of a tensor that is cut, and its pieces."""
    for dim, factor in enumerate(value.dims):
        pieces = layout(factor, cut)
        if any(piece.is_cut for piece in pieces):
            return dim, pieces
    return None


def _read_by_head(cuts: Cuts) -> Iterator[tuple[str, int]]:
    """(parameter that the head reads, the dim of it that is the vocabulary)"""
    assert cuts.record.logits is not None
    vocabulary = frozenset(leaves(cuts.record.logits.dims[-1]))
    users = users_of(cuts) if cuts.head is not None else {}
    for name, value in cuts.record.parameters.items():
        for dim, factor in enumerate(value.dims):
            if cuts.head in users.get(name, ()) and vocabulary == frozenset(leaves(factor)):
                yield name, dim


def users_of(cuts: Cuts) -> dict[str, set[str]]:
    """The modules whose own forward reads a parameter."""
    names = {id(value): name for name, value in cuts.record.parameters.items()}
    found: defaultdict[str, set[str]] = defaultdict(set)
    for op in cuts.record.ops:
        for value in op.inputs:
            if id(value) in names:
                found[names[id(value)]].add(op.module)
    return found


def _rule(
    cuts: Cuts, name: str, module: nn.Module, users: Mapping[str, set[str]], divide: tuple[str, ...]
) -> Reasoned | None:
    own = [f"{name}.{each}".lstrip(".") for each, _ in module.named_parameters(recurse=False)]
    known = [each for each in own if each in cuts.record.parameters]
    by_name = _read_by_name(cuts, name, users)
    if name in cuts.table:
        return _table_rule(cuts, name)
    if name == cuts.head:
        return _head_rule(cuts, name, module, known)
    if name in cuts.alone:
        return cuts.alone[name]
    entries = [region for region in cuts.regions if region.entry == name]
    buffers = _cut_buffers(cuts, name)
    parameters = tuple(
        (each[len(name) + 1 :] if name else each, held(cuts, each)) for each in (*known, *by_name, *buffers)
    )
    roles = [name in entry.begins and name not in entry.ends for entry in entries]
    inner = [each for entry in entries for each in entry.begins if each.startswith(f"{name}.")]
    does_it_itself = any(roles) and not inner and _cuts_any(cuts, known)
    if entries and not does_it_itself:
        return _entry_rule(cuts, name, parameters, divide, entries)
    if cuts.sequence is not None and name == cuts.sequence.ends:
        why = "what follows asks how long sequences are, so they are gathered here"
        return Reasoned(Style(StyleName.WHOLE, input=Shard(1), output=Replicate()), why)
    if cuts.sequence is not None and name in cuts.sequence.whole:
        return Reasoned(Style(StyleName.WHOLE), "it needs the whole sequence, and tp cuts nothing in it")
    gathered = [each.candidate.gathered[name] for each in cuts.regions if name in each.candidate.gathered]
    if gathered:
        why = "it needs all of what is cut: gathered, computed whole, and cut again"
        style = Style(StyleName.WHOLE, input=Shard(-1), output=Shard(-1), pieces=gathered[0])
        return Reasoned(style, why)
    begins = [region for region in cuts.regions if name in region.begins and _cuts_any(cuts, known)]
    ends = [region for region in cuts.regions if name in region.ends]
    if begins and ends:
        raise UnfitError(f"{name} begins and ends a cut by itself")
    if begins:
        return _colwise(cuts, _Leaf(name, module, parameters, divide), begins[0])
    if ends:
        return _rowwise(cuts, _Leaf(name, module, parameters, divide), ends[0])
    if cuts.sequence is not None and name == cuts.sequence.begins and not cuts.sequence.is_at_embedding:
        style = Style(StyleName.SPLIT_INPUT, parameters=_cut_ones(parameters), divide=divide)
        return Reasoned(style, "what stands before asks how long sequences are, so they are cut here")
    if _cuts_any(cuts, [*known, *by_name]) or buffers or divide:
        style = Style(StyleName.LOCAL, parameters=parameters, divide=divide)
        return Reasoned(style, "works on what is cut, part by part")
    if by_name:
        why = "reads parameters of modules inside by their names"
        return Reasoned(Style(StyleName.LOCAL, parameters=parameters), why)
    is_inside = cuts.sequence is not None and any(name.startswith(f"{each}.") for each in cuts.sequence.whole)
    if own and not known:
        known = _shared(cuts, module)
    kinds = {kind_of(cuts, each) for each in known}
    if not known or (is_inside and kinds == {Kind.WHOLE}):
        return None  # what runs whole holds all inside
    return _whole_rule(cuts, name, known)


def _shared(cuts: Cuts, module: nn.Module) -> list[str]:
    """The parameters of a module, by the names that others have for them."""
    names = {id(parameter): name for name, parameter in cuts.model.named_parameters()}
    return [names[id(parameter)] for parameter in module.parameters(recurse=False)]


def _head_rule(cuts: Cuts, name: str, module: nn.Module, known: list[str]) -> Reasoned:
    rows = {each[len(name) + 1 :]: Held(Shard(dim)) for each, dim in cuts.of_head.items() if each in known}
    # a tied head's weight has the name of the table's
    of_own = {each: rows.get(each, Held(Shard(0))) for each, _ in module.named_parameters(recurse=False)}
    _, told = _told(module, tuple(of_own.items()), 0)
    style = Style(StyleName.COLWISE, input=cuts.around(name), output=cuts.head_output, parameters=told)
    return Reasoned(style, "logits stay cut by vocabulary, for a loss that takes them so")


def _table_rule(cuts: Cuts, name: str) -> Reasoned:
    is_first = name == cuts.table[0]
    style = cuts.table_style if is_first else Style(StyleName.ROWWISE, output=Replicate())
    return Reasoned(style, "a look-up by id: each rank has its part of the table")


def _entry_rule(
    cuts: Cuts,
    name: str,
    parameters: tuple[tuple[str, Held], ...],
    divide: tuple[str, ...],
    entries: list[Region],
) -> Reasoned:
    style = Style(
        StyleName.GATHER_INPUT,
        input=cuts.around(name),
        output=cuts.around(name) if any(name in region.ends for region in entries) else None,
        parameters=_added_once(cuts, name, parameters, entries),
        divide=divide,
        every_input=any(region.every_input for region in entries),
    )
    begins = ", ".join(sorted({each.rpartition(".")[2] for region in entries for each in region.begins}))
    what = "gathered" if style.input == Shard(1) else "taken as it is"
    return Reasoned(style, f"its input is {what} once for {begins}; the parts of its gradient are summed")


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A module that owns what is cut: how its parameters are held, and which of its counts are a rank's."""

    name: str
    module: nn.Module
    parameters: tuple[tuple[str, Held], ...]
    divide: tuple[str, ...]

    def style(
        self, name: StyleName, parameters: tuple[tuple[str, Held], ...], dim: int, **ways: Any
    ) -> Style:
        """dim: of a linear layer's weight that the style cuts. ways: what becomes of its input and output."""
        held_so, told = _told(self.module, parameters, dim)
        return Style(
            name, pieces=held_so.pieces, parts=held_so.parts, parameters=told, divide=self.divide, **ways
        )


def _colwise(cuts: Cuts, leaf: _Leaf, region: Region) -> Reasoned:
    entry = cuts.around(leaf.name) if region.entry is None or region.entry == leaf.name else None
    style = leaf.style(StyleName.COLWISE, leaf.parameters, 0, input=entry)
    return Reasoned(style, f"each rank makes its part of the {_what(cuts, region)}")


def _rowwise(cuts: Cuts, leaf: _Leaf, region: Region) -> Reasoned:
    is_inner = leaf.name in region.inner_ends
    style = leaf.style(
        StyleName.ROWWISE,
        _added_once(cuts, leaf.name, leaf.parameters, [region]),
        1,
        output=Replicate() if is_inner else cuts.around(leaf.name),
        gradient=Partial() if is_inner else None,
    )
    how = "reduce-scattered" if style.output == Shard(1) else "summed"
    how += ", and so are those of its gradient, since it goes on into what is cut" if is_inner else ""
    return Reasoned(style, f"takes its part of the {_what(cuts, region)}; the parts of the sum are {how}")


def _what(cuts: Cuts, region: Region) -> str:
    leaf = region.candidate.leaf
    return f"{cuts.names.of(leaf)} ({leaf.size:,})"


def _added_once(
    cuts: Cuts, module: str, parameters: tuple[tuple[str, Held], ...], regions: list[Region]
) -> tuple[tuple[str, Held], ...]:
    """Biases beside a sum over ranks: one rank adds them, which the style knows of what is just whole."""
    added = set[Value]().union(*(region.added for region in regions))
    names = {name for name, value in cuts.record.parameters.items() if value in added}
    return tuple(
        (name, Held(Replicate()) if f"{module}.{name}".lstrip(".") in names else how)
        for name, how in parameters
    )


def _told(
    module: nn.Module, parameters: tuple[tuple[str, Held], ...], dim: int
) -> tuple[Held, tuple[tuple[str, Held], ...]]:
    """(how a linear layer's weight is held, whose pieces its rule says; parameters that a rule must say:
    nothing for such a layer whose weight is cut in its usual dim)"""
    is_linear = type(module).forward is nn.Linear.forward
    weight = dict(parameters).get("weight")
    if is_linear and weight is not None and weight.placement == Shard(dim):
        return weight, ()
    return Held(Replicate()), parameters


def _cut_ones(parameters: tuple[tuple[str, Held], ...]) -> tuple[tuple[str, Held], ...]:
    return tuple((name, how) for name, how in parameters if how != Held(Replicate()))


def _whole_rule(cuts: Cuts, name: str, known: list[str]) -> Reasoned:
    kinds = {kind_of(cuts, each) for each in known}
    if kinds == {Kind.WHOLE}:
        return Reasoned(Style(StyleName.REPLICATE), "every rank computes the same with it")
    if len(kinds) > 1:
        style = Style(
            StyleName.LOCAL,
            parameters=tuple((each[len(name) + 1 :] if name else each, held(cuts, each)) for each in known),
        )
        return Reasoned(style, "of some of its parameters each rank computes a part of the gradient")
    if cuts.sequence is not None and _sees_a_part(cuts, name):
        why = "each rank sees its part of the tokens: the parts of the gradient are summed"
        return Reasoned(Style(StyleName.SEQUENCE_PARALLEL), why)
    why = "whole, on what is cut: each rank computes a part of its gradient, which is summed"
    return Reasoned(Style(StyleName.REPLICATE, gradient=Partial()), why)


def _sees_a_part(cuts: Cuts, name: str) -> bool:
    assert cuts.sequence is not None
    events = cuts.record.events
    own = (event for at, event in enumerate(events) if at in cuts.sequence.ops and isinstance(event, Op))
    return any(op.module == name for op in own)


def _cuts_any(cuts: Cuts, names: list[str]) -> bool:
    return any(isinstance(held(cuts, name).placement, Shard) for name in names)


def _cut_buffers(cuts: Cuts, module: str) -> list[str]:
    """A module's own buffers that have what is cut inside it, and that its forward reads."""
    cut = cuts.cut_in(module)
    return [
        name
        for name, value in cuts.record.buffers.items()
        if name.rpartition(".")[0] == module and cut_dim(value, cut) is not None
    ]


def _read_by_name(cuts: Cuts, module: str, users: Mapping[str, set[str]]) -> list[str]:
    """Parameters of modules below that a module's own forward reads without calling them, and that a rank
    can't give it as they are."""
    return list(_read(cuts, module, users))


def _read(cuts: Cuts, module: str, users: Mapping[str, set[str]]) -> Iterator[str]:
    for name in cuts.record.parameters:
        owner = name.rpartition(".")[0]
        is_below = owner != module and (not module or owner.startswith(f"{module}."))
        if is_below and module in users.get(name, ()):
            yield name
