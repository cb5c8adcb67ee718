"""What is cut alone: projections that no cut of several weights takes in. Each rank makes its part of what
such a one gives, and that is gathered at once, so that nothing around needs to know.

It is what is left to do where heads are too few, an op needs all of what is made, or nothing uses a weight at
all: a rank's memory then has its part, for as many numbers as are sent for one sum.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

from torch import nn

from shardwise.core.layer_name import any_layer, is_inside
from shardwise.core.made_plan import CutAlone
from shardwise.core.placement import Partial, Replicate, Shard
from shardwise.core.plan import Style, StyleName
from shardwise.dims.factors import leaves
from shardwise.dims.record import Value
from shardwise.dims.spans import Spans
from shardwise.planner.rules import Cuts, Reasoned, rules_of, users_of

# of all parameters: equal projections of all layers that have less aren't worth a message
LEAST_SHARE = 0.005
_LINEAR_OPS = frozenset(
    {"t", "transpose", "permute", "mm", "addmm", "bmm", "baddbmm", "view", "_unsafe_view", "expand", "add"}
)


def cut_alone(
    cuts: Cuts, spans: Spans, whole: nn.Module, reasons: Mapping[str, str], asked: Collection[str] = ()
) -> dict[str, Reasoned]:
    """Module -> its style, and why. whole: the model with all its layers. reasons: why nothing of a parameter
    is cut otherwise. asked: modules that are to stay whole, as patterns."""
    rules = rules_of(cuts)
    users, names = users_of(cuts), _names(cuts.model)
    sizes = Counter[str]()
    for name, parameter in whole.named_parameters():
        sizes[any_layer(name)] += parameter.numel()
    least = LEAST_SHARE * sum(sizes.values())
    found = {}
    for name, module in cuts.model.named_modules():
        if not name or not _is_even(module, cuts.ranks) or is_inside(any_layer(name), asked):
            continue
        weight = f"{name}.weight"
        own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
        if sizes[any_layer(weight)] < least or any(len(names[id(each)]) > 1 for each in module.parameters()):
            continue
        if any(users.get(each, {name}) != {name} for each in own):
            continue
        style = _style(cuts, spans, rules, name, module)
        if style is not None:
            found[name] = Reasoned(style, _why(spans, name, reasons.get(weight)))
    return found


def listed(cuts: Cuts, whole: nn.Module, like: Callable[[str], str]) -> tuple[CutAlone, ...]:
    """What is cut alone, in all layers. like: the traced name of a parameter."""
    found = Counter[tuple[str, str]]()
    for name, parameter in whole.named_parameters():
        own = cuts.alone.get(like(name).rpartition(".")[0])
        if own is not None:
            found[any_layer(name.rpartition(".")[0]), own.why] += parameter.numel()
    return tuple(CutAlone(pattern, n, why) for (pattern, why), n in found.items())


def _is_even(module: nn.Module, ranks: int) -> bool:
    """Whether it is of a kind that can be cut alone, and ranks share out evenly what it gives."""
    match module:
        case nn.Linear():
            return module.out_features % ranks == 0
        case nn.Embedding():
            return module.num_embeddings % ranks == 0
    return False


def _names(model: nn.Module) -> dict[int, list[str]]:
    found: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
    return found


def _why(spans: Spans, name: str, reason: str | None) -> str:
    if not spans.of[name]:
        return "nothing uses it: each rank keeps its part"
    because = f", since no other cut takes it in ({reason})" if reason else ""
    return f"each rank makes its part of what it gives, which is gathered at once{because}"


def _style(
    cuts: Cuts, spans: Spans, rules: Mapping[str, Reasoned], name: str, module: nn.Module
) -> Style | None:
    """How a module that its rule leaves whole can be cut alone; None where it can't, or isn't whole. A table
    only where nobody looks anything up in it: what it gives is as wide as what follows."""
    rule = rules.get(name)
    own = rule.style if rule is not None else Style(StyleName.REPLICATE)
    is_inside = any(style is StyleName.GATHER_INPUT for style in _around(rules, name))
    if name in (cuts.head, *cuts.table):
        return None
    if isinstance(module, nn.Embedding):
        is_unused = not spans.of[name] and own == Style(StyleName.REPLICATE)
        return Style(StyleName.ROWWISE, output=Replicate()) if is_unused else None
    if not _is_linear(cuts, spans, name, module):
        return None
    if any(not cuts.cut_in(name).isdisjoint(value.leaves()) for value in _taken(spans, name)):
        return None
    gathered = Style(StyleName.COLWISE, output=Replicate())
    match own:
        case Style(name=StyleName.REPLICATE, gradient=gradient):
            return gathered if (gradient == Partial()) == is_inside else None
        case Style(name=StyleName.SEQUENCE_PARALLEL):
            if is_inside or not all(_is_by_sequence(cuts, value) for value in _taken(spans, name)):
                return None
            return Style(StyleName.COLWISE, input=Shard(1), output=Shard(1))
    return None


def _around(rules: Mapping[str, Reasoned], name: str) -> Iterator[StyleName]:
    """Of the styles around a module, the nearest that says what a whole tensor's gradient is."""
    while name:
        name = name.rpartition(".")[0]
        style = rules[name].style.name if name in rules else None
        if style in (StyleName.GATHER_INPUT, StyleName.WHOLE):
            yield style
            return


def _is_linear(cuts: Cuts, spans: Spans, name: str, module: nn.Module) -> bool:
    """Whether a part of its weight's rows gives that part of its last dim, and nothing else."""
    if type(module).forward is nn.Linear.forward:
        return True
    rows = cuts.record.parameters[f"{name}.weight"].dims[0]
    given = [span.outputs[0].dims[-1] for span in spans.of[name] if span.outputs]
    is_plain = {op.name for op in cuts.record.ops if op.module == name} <= _LINEAR_OPS
    is_same = all(dim.size == rows.size and list(leaves(dim)) == list(leaves(rows)) for dim in given)
    return is_plain and is_same and bool(given)


def _taken(spans: Spans, name: str) -> Iterator[Value]:
    """What its calls take and give."""
    for span in spans.of[name]:
        yield from (*span.inputs, *span.outputs)


def _is_by_sequence(cuts: Cuts, value: Value) -> bool:
    """[B, S, features]"""
    return len(value.dims) == 3 and frozenset(leaves(value.dims[1])) == cuts.record.sequence
