"""Linear layers that work together and are cut apart: refused with the two ways to mend it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from shardwise.core.placement import Partial, Replicate
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.parallel.resolve import resolve
from tests.unit.test_resolve import COLWISE, REPLICATE, ROWWISE, changed, llama, refusal

WHOLE = Style(StyleName.WHOLE, input=Replicate(), output=Replicate())


class UpAndDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 40)


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        (COLWISE, ROWWISE, ""),
        (replace(COLWISE, output=Replicate()), REPLICATE, ""),
        (REPLICATE, replace(ROWWISE, input=Replicate()), ""),
        (
            COLWISE,
            REPLICATE,
            'rule "down" (replicate): down takes 16 features, and gets each rank\'s part of them, since up '
            'is cut by rule "up" (colwise). Make it rowwise, or say output = "replicate" there.',
        ),
        (
            REPLICATE,
            ROWWISE,
            'rule "down" (rowwise): down takes each rank\'s part of 16 features, and gets all of them, since '
            'up gives them whole by rule "up" (replicate). Make that colwise, or say input = "replicate" '
            "here.",
        ),
        (
            replace(COLWISE, output=Replicate()),
            ROWWISE,
            'rule "down" (rowwise): down takes each rank\'s part of 16 features, and gets all of them, since '
            'up gives them whole by rule "up" (colwise). Make that colwise, or say input = "replicate" '
            "here.",
        ),
    ],
)
def test_half_of_a_pair_is_refused_with_the_two_ways_to_mend_it(up: Style, down: Style, message: str) -> None:
    styles = {"table": replace(ROWWISE, output=Replicate()), "up": up, "down": down, "head": COLWISE}
    plan = Plan("p", tuple(Rule(pattern, style) for pattern, style in styles.items()))
    with torch.device("meta"):
        model = UpAndDown()
    if not message:
        resolve(model, plan, tp=2)
        return
    assert refusal(model, plan) == f'plan "p": {message}'


class Adapted(nn.Module):
    """An adapter's narrow and its wide side, beside what it adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.up = nn.ModuleDict({"base": nn.Linear(12, 24), "a": nn.Linear(12, 4), "b": nn.Linear(4, 24)})
        self.head = nn.Linear(24, 40)


def test_half_of_an_adapter_inside_what_is_left_whole_is_refused() -> None:
    """What `whole` holds has no rule of its own."""
    styles = {"table": replace(ROWWISE, output=Replicate()), "up": WHOLE, "up.a": COLWISE, "head": COLWISE}
    plan = Plan("p", tuple(Rule(pattern, style) for pattern, style in styles.items()))
    with torch.device("meta"):
        model = Adapted()
    assert refusal(model, plan) == (
        'plan "p": rule "up" (whole): up.b takes 4 features, and gets each rank\'s part of them, since up.a '
        'is cut by rule "up.a" (colwise). Make it rowwise, or say output = "replicate" there.'
    )
    gathered = replace(COLWISE, output=Replicate())
    resolve(model, with_rule(plan, "up.a", gathered), tp=2)


def with_rule(plan: Plan, pattern: str, style: Style) -> Plan:
    rules = (Rule(pattern, style) if rule.pattern == pattern else rule for rule in plan.rules)
    return replace(plan, rules=tuple(rules))


@pytest.mark.parametrize(
    ("n_kv_heads", "tp", "cure"),
    [(4, 2, 'style = "colwise"'), (2, 4, '{ style = "colwise", pieces = "16/2" }')],
)
def test_whole_kv_heads_under_cut_queries_are_refused_unless_there_is_one(
    n_kv_heads: int, tp: int, cure: str
) -> None:
    whole = replace(REPLICATE, gradient=Partial())
    plan = changed("rowwise", layers__ANY__attention__wk=whole, layers__ANY__attention__wv=whole)
    assert refusal(llama(n_kv_heads=n_kv_heads), plan, tp=tp) == (
        f'plan "mine": rule "layers.*.attention.wk" (replicate) keeps {n_kv_heads} KV heads of '
        'layers.0.attention whole, and rule "layers.*.attention.wq" (colwise) gives each rank its part of '
        f"the query heads, which would meet the wrong ones. Use {cure} for layers.0.attention.wk and "
        "layers.0.attention.wv, or keep the queries whole too."
    )
    resolve(llama(n_kv_heads=1), plan, tp=tp)
    of_each = replace(COLWISE, pieces=(48, 48))  # a part of each KV head's queries
    resolve(llama(n_kv_heads=2), with_rule(plan, "layers.*.attention.wq", of_each), tp=2)
