"""Patterns: styles of the modules of a traced model, which has one layer of each kind -> a plan's rules for
all layers."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator

from torch import nn

from shardwise.core.layer_name import any_layer, layer_index
from shardwise.core.plan import ROOT, Rule
from shardwise.models.layers import Layers
from shardwise.planner.rules import Reasoned


def everywhere(
    styles: dict[str, Reasoned], traced: Collection[str], whole: nn.Module, layers: Layers | None
) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """(rules, why each): a pattern with `*` where all modules of that name have one style, the most common
    one and then the others by their own names where they differ."""
    like = layers.representative(whole) if layers is not None else (lambda name: name)
    first = f"{layers.prefix}.0" if layers is not None else None
    untraced = {any_layer(name): each for name, each in styles.items()}  # of lists that were traced shortened
    all_styles: dict[str, Reasoned | None] = {}
    for name, _ in whole.named_modules():
        own = styles.get(name) if name == first else styles.get(like(name))
        if layers is not None and name != first and like(name) == first:
            own = styles.get(f"{layers.prefix}.1")
        if own is None and like(name) not in traced:
            own = untraced.get(any_layer(name))
        all_styles[name] = own
    rules: list[Rule] = []
    comments: dict[str, str] = {}
    for pattern, reasoned in _patterns(all_styles, layers):
        rules.append(Rule(pattern or ROOT, reasoned.style))
        comments[pattern or ROOT] = reasoned.why
    return tuple(rules), comments


def _patterns(styles: dict[str, Reasoned | None], layers: Layers | None) -> Iterator[tuple[str, Reasoned]]:
    """Patterns for styles: all of a name alike with every number as `*`, else with the layer's number as `*`,
    the most common style first."""
    by_name: defaultdict[str, dict[str, Reasoned | None]] = defaultdict(dict)
    for name, own in styles.items():
        by_name[any_layer(name)][name] = own
    for pattern, modules in by_name.items():
        if len(set(modules.values())) == 1:
            yield from _said(pattern, modules)
            continue
        by_layer: defaultdict[str, dict[str, Reasoned | None]] = defaultdict(dict)
        for name, own in modules.items():
            by_layer[_in_any_layer(name, layers)][name] = own
        for part, alike in by_layer.items():
            yield from _said(part, alike)


def _said(pattern: str, modules: dict[str, Reasoned | None]) -> Iterator[tuple[str, Reasoned]]:
    ((common, n),) = Counter(modules.values()).most_common(1)
    is_common = common is not None and n > 1 and None not in modules.values()
    if is_common and common is not None:
        yield pattern, common
    for name, own in modules.items():
        if own is not None and not (is_common and own == common):
            yield name, own


def _in_any_layer(name: str, layers: Layers | None) -> str:
    index = layer_index(name, layers.prefix) if layers is not None else None
    if index is None or layers is None:
        return name
    return f"{layers.prefix}.*{name[len(f'{layers.prefix}.{index}') :]}"
