"""Classes: a traced model's candidates as a reader's noun (core/dims.py), named by what the forward does with
them, equal layers as one."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from shardwise.core.dims import DimClass, Dims, Member, Weight
from shardwise.core.layer_name import any_layer
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Shard
from shardwise.core.plan import Plan, StyleName
from shardwise.dims.factors import Factor, find, leaves
from shardwise.dims.record import Op, Record
from shardwise.dims.spans import Spans
from shardwise.models.layers import Layers
from shardwise.planner.candidates import Candidate
from shardwise.planner.names import HEADS, KV_HEADS, QUERY_HEADS, VOCABULARY, Names
from shardwise.planner.regions import UnfitError, region_of
from shardwise.planner.rules import Cuts, held


def dims_of(
    source: str,
    wish: tuple[Mesh, int],
    record: Record,
    spans: Spans,
    found: list[Candidate],
    cuts: Cuts | None,
    whole: nn.Module,
    layers: Layers | None,
) -> Dims:
    """wish: the mesh, and the length of sequences. cuts: what the plan cuts; None where nothing can be.
    whole: the model with all its layers."""
    mesh, seq = wish
    like = layers.representative(whole) if layers is not None else (lambda name: name)
    times = Counter((any_layer(name), tuple(each.shape)) for name, each in whole.named_parameters())
    used = _first_uses(record)
    made, place_of = _Classes(record, spans, cuts, times, seq).of(found, used)
    first_of: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, parameter in whole.named_parameters():
        first_of.setdefault((any_layer(name), tuple(parameter.shape)), like(name))
    order = sorted(first_of.items(), key=lambda item: used.get(item[1], len(record.events)))
    weights = tuple(_weight(pattern, traced, record, cuts, times, place_of) for pattern, traced in order)
    repeated = (f"{layers.prefix}.*", layers.count) if layers is not None else None
    parameters = sum(each.numel() for each in whole.parameters())
    unknown = tuple(sorted(record.unknown))
    return Dims(source, str(mesh), mesh.tp, seq, parameters, made, weights, repeated, unknown)


def with_rules(made: Dims, plan: Plan) -> Dims:
    """Beside each weight what a plan of the user's says of its module."""
    weights = tuple(replace(each, rule=_rule_of(plan, each.name)) for each in made.weights)
    return replace(made, weights=weights, plan=plan.name)


def _rule_of(plan: Plan, parameter: str) -> str:
    """Of the nearest module around a parameter that says how it is held; else of its own module."""
    module = parameter.rpartition(".")[0].replace("*", "0")
    own = plan.rule_for(module)
    above = module
    while above and own is None:
        above = above.rpartition(".")[0]
        rule = plan.rule_for(above) if above else None
        below = parameter.replace("*", "0")[len(above) + 1 :]
        if rule is not None and below in dict(rule.style.parameters):
            own = rule
    return str(own.style.name) if own is not None else "no rule"


Times = Mapping[tuple[str, tuple[int, ...]], int]


def _first_uses(record: Record) -> dict[str, int]:
    """Parameter -> the event that first takes it."""
    names = {value: name for name, value in record.parameters.items()}
    found: dict[str, int] = {}
    for at, event in enumerate(record.events):
        if isinstance(event, Op):
            for value in event.inputs:
                if value in names:
                    found.setdefault(names[value], at)
    return found


def _weight(
    pattern: tuple[str, tuple[int, ...]],
    traced: str,
    record: Record,
    cuts: Cuts | None,
    times: Times,
    place_of: Mapping[Factor, int],
) -> Weight:
    name, shape = pattern
    value = record.parameters.get(traced)
    classes: tuple[tuple[int, ...], ...] = ((),) * len(shape)
    if value is not None:
        classes = tuple(
            tuple(dict.fromkeys(place_of[leaf] for leaf in leaves(dim) if leaf in place_of))
            for dim in value.dims
        )
    return Weight(name, shape, times[pattern], classes, held_by_rank(cuts, traced))


def held_by_rank(cuts: Cuts | None, name: str) -> str:
    """How a rank has a parameter under the plan, as a plan file says it."""
    if cuts is None or name not in cuts.record.parameters:
        return "replicate"
    module = name.rpartition(".")[0]
    if module in cuts.table:
        style = cuts.table_style.name if module == cuts.table[0] else StyleName.ROWWISE
        dim = {StyleName.COLWISE: 1, StyleName.REPLICATED: None}.get(style, 0)
        return "replicate" if dim is None else f"shard({dim})"
    if module == cuts.head:
        own = vocabulary_of(cuts.record)
        dims = [at for at, each in enumerate(cuts.record.parameters[name].dims) if own & set(leaves(each))]
        return f"shard({dims[0]})" if dims else "replicate"
    return str(held(cuts, name))


def vocabulary_of(record: Record) -> frozenset[Factor]:
    """The leaves of the logits' last dim, and of the rows that ids are looked up in."""
    found = set(leaves(record.logits.dims[-1])) if record.logits is not None else set()
    for op in record.ops:
        if op.name == "embedding" and op.inputs[-1].is_live and not op.inputs[-1].has_gradient:
            found.update(leaves(op.inputs[0].dims[0]))
    return frozenset(found)


class _Classes:
    """Candidates of all layers -> classes."""

    def __init__(self, record: Record, spans: Spans, cuts: Cuts | None, times: Times, seq: int) -> None:
        self._record, self._spans, self._cuts, self._times = record, spans, cuts, times
        self._tokens = record.ids.dims[0].size * seq if record.ids is not None else seq
        self._names = cuts.names if cuts is not None else Names(record)
        regions = cuts.regions if cuts is not None else []
        self._regions = {region.candidate.leaf: region for region in regions}

    def of(
        self, found: list[Candidate], used: Mapping[str, int]
    ) -> tuple[tuple[DimClass, ...], dict[Factor, int]]:
        """(the classes, those that are cut in the order of the forward and then the others by size; the place
        of each leaf's class). used: see _first_uses()."""
        vocabulary = vocabulary_of(self._record)
        groups: dict[object, list[Candidate]] = defaultdict(list)
        for candidate in found:
            if candidate.leaf not in vocabulary:
                members = frozenset((any_layer(name), dim) for name, dim in candidate.members)
                groups[candidate.leaf.size, candidate.leaf in self._regions, members].append(candidate)
        made = [(self._class(group[0]), [each.leaf for each in group]) for group in groups.values()]
        made.append((self._vocabulary(vocabulary), list(vocabulary)))
        order = {any_layer(name): at for name, at in reversed(list(used.items()))}

        def place(pair: tuple[DimClass, object]) -> tuple[bool, int]:
            one, _ = pair
            first = min((order.get(each.parameter, len(order)) for each in one.members), default=0)
            return not one.is_cut, first if one.is_cut else -self._elements(one)

        made.sort(key=place)
        everyone = [each for each, _ in made]
        classes = tuple(_beside(each, everyone) for each in everyone)
        return classes, {leaf: at for at, (_, own) in enumerate(made) for leaf in own}

    def _class(self, candidate: Candidate) -> DimClass:
        leaf = candidate.leaf
        region = self._regions.get(leaf)
        if region is None and not candidate.obstacles:
            try:
                region = region_of(self._record, self._spans, candidate)
            except UnfitError:
                region = None
        members = tuple(
            Member(any_layer(name), dim, self._held(name, dim, leaf), len(self._record.parameters[name].dims))
            for name, dim in dict.fromkeys(candidate.members)
        )
        begins, ends, gathers = (
            tuple(dict.fromkeys(map(any_layer, names)))
            for names in (((), (), ()) if region is None else (region.begins, region.ends, region.entries))
        )
        obstacles = dict.fromkeys(map(any_layer, candidate.obstacles))
        return DimClass(
            self._names.of(leaf), _where(members), leaf.size, self._width(candidate),
            self._count(candidate), members, begins, ends, gathers, candidate.sums / self._tokens,
            tuple(obstacles), is_cut=leaf in self._regions,
            whole_at=tuple(dict.fromkeys(map(any_layer, sorted(candidate.gathered)))),
        )  # fmt: skip

    def _held(self, name: str, dim: int, leaf: Factor) -> str:
        if self._cuts is None or leaf not in self._regions:
            return ""
        how = held(self._cuts, name)
        return str(how) if how.placement == Shard(dim) else ""

    def _width(self, candidate: Candidate) -> int:
        """Of one unit, in the largest weight; its other pieces aren't the unit's."""
        dims = [self._record.parameters[name].dims[dim] for name, dim in candidate.members]
        return max(1, max(_size_with(dim, candidate.leaf) for dim in dims) // candidate.leaf.size)

    def _count(self, candidate: Candidate) -> int:
        name, _ = candidate.members[0]
        return self._times.get((any_layer(name), self._record.parameters[name].shape), 1)

    def _vocabulary(self, own: frozenset[Factor]) -> DimClass:
        cuts, members = self._cuts, []
        for name, value in self._record.parameters.items():
            for dim, factor in enumerate(value.dims):
                if not own.isdisjoint(leaves(factor)):
                    how = held_by_rank(cuts, name)
                    own_held = how if how == f"shard({dim})" else ""
                    members.append(Member(any_layer(name), dim, own_held, len(value.dims)))
        begins = cuts.table if cuts is not None else ()
        ends = (cuts.head,) if cuts is not None and cuts.head is not None else ()
        sizes = [leaf.size for leaf in own]
        return DimClass(
            VOCABULARY, "", max(sizes, default=1), 1, 1, tuple(members), begins, ends, ends,
            is_cut=any(each.held for each in members) and cuts is not None,
        )  # fmt: skip

    def _elements(self, made: DimClass) -> int:
        """Of all its members in all layers, each whole."""
        shapes = {any_layer(name): value.shape for name, value in self._record.parameters.items()}
        return made.times * sum(math.prod(shapes[each.parameter]) for each in made.members)


def _size_with(factor: Factor, leaf: Factor) -> int:
    """The entries of a dim but for those pieces that lack a leaf."""
    factor = find(factor)
    has = [leaf in leaves(part) for part in factor.parts]
    if factor.is_leaf or not any(has):
        return factor.size
    own = [
        _size_with(part, leaf) for part, it in zip(factor.parts, has, strict=True) if it or not factor.is_sum
    ]
    return sum(own) if factor.is_sum else math.prod(own)


def _where(members: Sequence[Member]) -> str:
    """The least module that holds all of them; of one alone, its own."""
    modules = [each.parameter.rpartition(".")[0].split(".") for each in members]
    common = []
    for names in zip(*modules, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _beside(made: DimClass, everyone: Sequence[DimClass]) -> DimClass:
    """A class among the others: query heads that share a KV head are no class of heads of their own; what is
    cut in the place of one that could be."""
    own = {each.parameter for each in made.members}
    if made.name == HEADS:
        others = [each for each in everyone if each.name == HEADS and each is not made]
        theirs = [{member.parameter for member in each.members} for each in others]
        if any(own < each for each in theirs):
            made = replace(made, name=QUERY_HEADS)
        elif any(each < own for each in theirs):
            made = replace(made, name=KV_HEADS)
    if made.is_cut or made.obstacles:
        return made
    cut = [each.name for each in everyone if each.is_cut and _share(each, own)]
    return replace(made, instead=cut[0] if cut else "")


def _share(other: DimClass, own: set[str]) -> bool:
    return not own.isdisjoint(member.parameter for member in other.members)
