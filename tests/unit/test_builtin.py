"""Built-in plans: what they differ in, and what is refused."""

import re

import pytest

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Engine, Ownership, Plan, StyleName
from shardwise.models.specs import SPECS
from shardwise.parallel.builtin import ABOUT, builtin_names, builtin_plan
from shardwise.parallel.resolve import is_sequence_parallel, resolve

WITHOUT = [name for name in builtin_names() if not name.startswith("routed")]


def without_embedding(plan: Plan) -> tuple[object, ...]:
    return tuple(rule for rule in plan.rules if rule.pattern != "tok_embeddings")


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_plans_differ_in_the_embedding_and_the_engine_only(name: str) -> None:
    plan, rowwise = builtin_plan(name), builtin_plan("rowwise")
    assert plan.name == name
    assert [rule.pattern for rule in plan.rules] == [rule.pattern for rule in rowwise.rules]
    assert without_embedding(plan) == without_embedding(rowwise)
    assert plan.engine is (Engine.DTENSOR if name.endswith("@dtensor") else Engine.NATIVE)
    embedding = plan.rule_for("tok_embeddings")
    assert embedding is not None
    assert embedding.style.name == name.partition("@")[0].partition("-")[0]
    assert (embedding.style.ownership is Ownership.INTERLEAVED) == (name == "routed-interleaved")


@pytest.mark.parametrize("name", WITHOUT)
def test_without_sequence_parallelism_no_activation_is_cut_along_the_sequence(name: str) -> None:
    plan = builtin_plan(name, sequence_parallel=False)
    assert plan.name == f"{name} (no sequence parallelism)"
    assert not is_sequence_parallel(plan)
    assert is_sequence_parallel(builtin_plan(name))
    assert without_embedding(plan) == without_embedding(builtin_plan("rowwise", sequence_parallel=False))
    for rule in plan.rules:
        assert rule.style.name is not StyleName.SEQUENCE_PARALLEL
        assert Shard(1) not in (rule.style.input, rule.style.output)
    embedding = plan.rule_for("tok_embeddings")
    assert embedding is not None
    assert embedding.style.output == Replicate()


@pytest.mark.parametrize("name", ["routed", "routed-interleaved"])
def test_routed_is_not_offered_without_sequence_parallelism(name: str) -> None:
    message = (
        f'plan "{name}" isn\'t offered without sequence parallelism: without it every rank needs every row. '
        "Use rowwise, colwise or replicated."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        builtin_plan(name, sequence_parallel=False)


@pytest.mark.parametrize(
    ("name", "hint"), [("rowise", ' Did you mean "rowwise"?'), ("routed-interleave", ' Did you mean "routed-interleaved"?'), ("zzz", "")]
)
def test_an_unknown_plan_is_one_line(name: str, hint: str) -> None:
    message = (
        f'unknown plan "{name}".{hint} Known: rowwise, colwise, routed, routed-interleaved, replicated, rowwise@dtensor, colwise@dtensor; '
        "or the path of a .toml file."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        builtin_plan(name)


def test_every_built_in_plan_says_what_it_is() -> None:
    assert tuple(ABOUT) == builtin_names()
    assert all(ABOUT.values())


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_plans_survive_toml(name: str) -> None:
    assert Plan.from_toml(builtin_plan(name).to_toml()) == builtin_plan(name)


@pytest.mark.parametrize("model", SPECS)
@pytest.mark.parametrize("name", builtin_names())
def test_built_in_plans_fit_every_model_at_tp_4(model: str, name: str) -> None:
    spec = SPECS[model].with_layers(1)
    assignments = resolve(spec.build(), builtin_plan(name), tp=4, seq=8192)
    assert len(assignments) == 14
