"""Built-in plans: what they differ in, and what is refused."""

import re

import pytest

from shardwise.core.errors import PlanError
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Replicate, Shard
from shardwise.core.plan import Engine, Family, Ownership, Plan, StyleName
from shardwise.models.specs import SPECS, get_spec
from shardwise.parallel.apply import parallelize
from shardwise.parallel.builtin import ABOUT, builtin_names, builtin_plan
from shardwise.parallel.resolve import resolve
from shardwise.trace.fakes import fake_world

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
    assert any(rule.style.name is StyleName.SEQUENCE_PARALLEL for rule in builtin_plan(name).rules)
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
    ("name", "hint"),
    [
        ("rowise", ' Did you mean "rowwise"?'),
        ("routed-interleave", ' Did you mean "routed-interleaved"?'),
        ("zzz", ""),
    ],
)
def test_an_unknown_plan_is_one_line(name: str, hint: str) -> None:
    message = (
        f'unknown plan "{name}".{hint} Known: rowwise, colwise, routed, routed-interleaved, replicated, '
        "rowwise@dtensor, colwise@dtensor; "
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
    spec = get_spec(f"{model}?tied=false").with_layers(1)
    if spec.family is Family.MOE and name.endswith("@dtensor"):
        message = (
            f"plan \"{name}\" isn't offered for a mixture of experts: PyTorch's own styles cut none. Use "
            "rowwise, colwise, routed, routed-interleaved, replicated."
        )
        with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
            builtin_plan(name, family=spec.family)
        return
    assignments = resolve(spec.build(), builtin_plan(name, family=spec.family), tp=4, seq=8192)
    assert len(assignments) == {Family.LLAMA: 14, Family.GPT: 12, Family.MOE: 15}[spec.family]


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("name", WITHOUT)
def test_the_rules_of_both_families_differ_in_their_own_modules_only(
    name: str, sequence_parallel: bool
) -> None:
    llama, gpt = (
        {r.pattern: r for r in builtin_plan(name, sequence_parallel=sequence_parallel, family=f).rules}
        for f in (Family.LLAMA, Family.GPT)
    )
    assert llama.keys() - gpt.keys() == {
        f"layers.*.{own}" for own in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w3")
    }
    assert gpt.keys() - llama.keys() == {"pos_embeddings", "layers.*.attention.wqkv"}
    assert all(llama[pattern] == gpt[pattern] for pattern in llama.keys() & gpt.keys())


@pytest.mark.parametrize(
    # PyTorch's styles have no replicated table
    ("name", "style"),
    [("rowwise", "replicated(output=shard(1))"), ("rowwise@dtensor", "rowwise(output=shard(1))")],
)
def test_each_rank_has_the_positions_of_its_part_of_the_sequence(name: str, style: str) -> None:
    rule = builtin_plan(name, family=Family.GPT).rule_for("pos_embeddings")
    assert rule is not None
    assert str(rule.style) == style


def test_parallelize_takes_the_rules_of_the_models_family() -> None:
    with fake_world(Mesh.parse("tp=2"), rank=0, device="cpu") as mesh:
        for model in ("llama3-debug", "gpt-debug", "moe-debug"):
            parallelize(get_spec(model).with_layers(1).build(), "rowwise", mesh)
