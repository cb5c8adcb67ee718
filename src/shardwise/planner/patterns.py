"""Patterns: styles of the modules of a traced model, which has one layer of each kind -> a plan's rules for
all layers."""

from collections import Counter, defaultdict
from collections.abc import Collection

from torch import nn

from shardwise.core.layer_name import any_layer
from shardwise.core.plan import Rule
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
    groups: defaultdict[str, dict[str, Reasoned | None]] = defaultdict(dict)
    for name, _ in whole.named_modules():
        if name:
            own = styles.get(name) if name == first else styles.get(like(name))
            if layers is not None and name != first and like(name) == first:
                own = styles.get(f"{layers.prefix}.1")
            if own is None and like(name) not in traced:
                own = untraced.get(any_layer(name))
            groups[any_layer(name)][name] = own
    rules: list[Rule] = []
    comments: dict[str, str] = {}

    def add(pattern: str, reasoned: Reasoned) -> None:
        rules.append(Rule(pattern, reasoned.style))
        comments[pattern] = reasoned.why

    for pattern, modules in groups.items():
        given = [each for each in modules.values() if each is not None]
        if not given:
            continue
        ((common, n),) = Counter(modules.values()).most_common(1)
        if n > 1 and common is not None:
            add(pattern, common)
        for name, each in modules.items():
            is_said = n > 1 and common is not None
            if each is not None and not (is_said and each == common):
                add(name, each)
    return tuple(rules), comments
