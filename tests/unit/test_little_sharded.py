"""What "little is sharded" means: one threshold, which explain and verify hold a plan to alike."""

from dataclasses import replace

import pytest

from shardwise.core.case import StepSettings
from shardwise.core.finding import FindingKind
from shardwise.core.mesh import Mesh
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.explain.explain import explain
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.trace.trace import trace
from shardwise.verify.claim import Claim
from shardwise.verify.without_ranks import check

MOSTLY_TABLE = "llama3-debug?n_layers=2,hidden=48,n_heads=4,n_kv_heads=2,vocab_size=9600,tied=true"
MOSTLY_LAYERS = "llama3-debug?n_layers=2,hidden=48,n_heads=4,n_kv_heads=2,vocab_size=96"
TP = Mesh.parse("tp=2")


def with_whole_layers(plan: Plan) -> Plan:
    """Embedding and head sharded, and nothing between them."""
    whole = Style(StyleName.REPLICATE)
    rules = (
        Rule(rule.pattern, whole) if rule.pattern.startswith("layers.") else rule
        for rule in plan.rules
        if rule.style.name is not StyleName.GATHER_INPUT
    )
    return replace(plan, name="layers-whole", rules=tuple(rules))


OUTER_ONLY = with_whole_layers(builtin_plan("rowwise", sequence_parallel=False))


def explained_as_little(model: str, plan: Plan) -> bool:
    explanation = explain(trace(get_spec(model), plan, TP, StepSettings(batch=1, seq=16)))
    return FindingKind.LITTLE_IS_SHARDED in {finding.kind for finding in explanation.findings}


def checked_as_little(model: str, plan: Plan) -> bool:
    (verification,) = check([Claim(model, plan.to_toml(), plan.name)], mesh=TP, settings=StepSettings(1, 16))
    return FindingKind.LITTLE_IS_SHARDED in {finding.kind for finding in verification.findings}


@pytest.mark.parametrize(
    ("model", "plan", "is_little"),
    [
        (MOSTLY_TABLE, builtin_plan("replicated"), False),
        (MOSTLY_TABLE, OUTER_ONLY, True),
        (MOSTLY_LAYERS, builtin_plan("replicated"), False),
        (MOSTLY_LAYERS, OUTER_ONLY, True),
    ],
    ids=[
        "mostly table, layers cut",
        "mostly table, table cut",
        "mostly layers, layers cut",
        "mostly layers, table cut",
    ],
)
def test_explain_and_verify_call_the_same_plans_little_sharded(
    model: str, plan: Plan, is_little: bool
) -> None:
    assert explained_as_little(model, plan) is is_little
    assert checked_as_little(model, plan) is is_little
