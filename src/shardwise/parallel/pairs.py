"""Linear layers that work together, as far as sizes and the module around them tell: one gives what another
takes, and heads of queries meet those of keys. What only the forward tells a proof finds (verify)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate, Shard
from shardwise.parallel.layers import LinearSharder
from shardwise.parallel.leaves import CutLeaf, WholeLeaf
from shardwise.parallel.sharder import Assignment, Fit


def check_pairs(assignments: Iterable[Assignment], fit: Fit, head: nn.Module | None) -> None:
    """Raises PlanError where one of two layers in one module is cut and the other would have to be."""
    inside: defaultdict[str, list[Assignment]] = defaultdict(list)
    everyone = (each for assignment in assignments for each in (assignment, *_held_below(assignment)))
    for assignment in everyone:
        is_plain = isinstance(assignment.sharder, LinearSharder | CutLeaf | WholeLeaf)
        if isinstance(assignment.module, nn.Linear) and is_plain and "weight" in assignment.held:
            inside[assignment.name.rpartition(".")[0]].append(assignment)
    place = {name: at for at, name in enumerate(fit.modules)}
    for name, layers in inside.items():
        parent = fit.modules[name]
        layers.sort(key=lambda each: place[each.name])
        _check_features([layer for layer in layers if layer.module is not head], _matrices(parent, head))
        head_dim = getattr(parent, "head_dim", None)
        if isinstance(head_dim, int) and head_dim > 0 and fit.tp > 1:
            _check_heads(name, layers, head_dim, fit.tp)


def _held_below(assignment: Assignment) -> Iterator[Assignment]:
    """Modules inside without a rule of their own, which are held whole by the one around them."""
    for path in assignment.below:
        module = assignment.module.get_submodule(path)
        name = f"{assignment.name}.{path}".lstrip(".")
        yield replace(assignment, name=name, module=module, sharder=WholeLeaf(), below=())


def _matrices(parent: nn.Module, head: nn.Module | None) -> frozenset[nn.Module]:
    """What else may give features: all modules right inside with a matrix, but tables and the head."""
    return frozenset(
        child
        for child in parent.children()
        if any(parameter.dim() > 1 for parameter in child.parameters(recurse=False))
        and child is not head
        and not isinstance(child, nn.Embedding)
    )


def _check_features(layers: list[Assignment], matrices: frozenset[nn.Module]) -> None:
    """One layer takes what all others beside it give, which stand before it: all of it, or each rank its
    part. Layers that give as much as they take tell nothing."""
    for index, taker in enumerate(layers):
        width, before = taker.module.in_features, layers[:index]
        givers = [each for each in before if each.module.out_features == width != each.module.in_features]
        if not givers:
            continue
        giver, where = givers[0], f"rule {taker.rule}: {taker.name}"
        others = {each for each in matrices if not _is_beside(each, giver.module, taker.module)}
        if {giver.module for giver in givers} != others - {taker.module}:
            continue
        if all(map(_gives_part, givers)) and not _takes_part(taker):
            raise PlanError(
                f"{where} takes {width} features, and gets each rank's part of them, since {giver.name} is "
                f'cut by rule {giver.rule}. Make it rowwise, or say output = "replicate" there.'
            )
        if not any(map(_gives_part, givers)) and _takes_part(taker):
            raise PlanError(
                f"{where} takes each rank's part of {width} features, and gets all of them, since "
                f"{giver.name} gives them whole by rule {giver.rule}. Make that colwise, or say input = "
                '"replicate" here.'
            )


def _is_beside(other: nn.Module, giver: nn.Module, taker: nn.Module) -> bool:
    """Whether a layer goes the way of both by itself, as what an adapter is beside does."""
    ends = getattr(other, "in_features", None), getattr(other, "out_features", None)
    return ends == (giver.in_features, taker.out_features)


def _gives_part(layer: Assignment) -> bool:
    is_cut = layer.held["weight"].placement == Shard(0)
    return is_cut and bool(layer.sharder.outputs) and layer.sharder.output_of(layer.style) == Shard(-1)


def _takes_part(layer: Assignment) -> bool:
    is_cut = layer.held["weight"].placement == Shard(1)
    return is_cut and bool(layer.sharder.inputs) and layer.sharder.input_of(layer.style) == Shard(-1)


def _check_heads(parent: str, layers: list[Assignment], head_dim: int, tp: int) -> None:
    """Queries are cut by heads, and two others of the same input, keys and values, are whole: then a rank's
    queries meet the wrong ones, unless there is one head of them, or each rank has its part of the queries of
    each, which pieces say."""
    for query in layers:
        if not _gives_part(query) or query.style.pieces:
            continue
        alike = [
            layer
            for layer in layers
            if layer.module.in_features == query.module.in_features
            and layer.held["weight"].placement == Replicate()
            and layer.module.out_features <= query.module.out_features
            and layer.module.out_features % head_dim == 0
        ]
        sizes = [layer.module.out_features for layer in alike]
        found = [layer for layer in alike if sizes.count(layer.module.out_features) == 2]
        heads = found[0].module.out_features // head_dim if found else 1
        if heads > 1:
            key, value = found
            cure = 'style = "colwise"'
            if heads % tp:
                cure = f'{{ style = "colwise", pieces = "{heads * head_dim}/{heads}" }}'
            raise PlanError(
                f"rule {key.rule} keeps {heads} KV heads of {parent} whole, and rule {query.rule} gives each "
                f"rank its part of the query heads, which would meet the wrong ones. Use {cure} for "
                f"{key.name} and {value.name}, or keep the queries whole too."
            )
