"""A plan that names a large model's sizes, for its small twin: the same pieces in the twin's sizes."""

import pytest

from shardwise.core.held import Held
from shardwise.core.mesh import Mesh
from shardwise.core.placement import Shard
from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.models.source import find_model
from shardwise.parallel.builtin import builtin_plan
from shardwise.verbs.twin_plan import plan_for_twin

pytest.importorskip("transformers")
TP = Mesh.parse("tp=2")


def test_pieces_become_the_twins() -> None:
    plan = Plan(
        "phi3",
        (
            Rule("model.layers.*.self_attn.qkv_proj", Style(StyleName.COLWISE, pieces=(3072, 3072, 3072))),
            Rule("model.layers.*.mlp.gate_up_proj", Style(StyleName.COLWISE, pieces=(8192, 8192))),
            Rule("lm_head", Style(StyleName.COLWISE)),
        ),
    )
    found = plan_for_twin(plan, find_model("hf:phi3"), TP)
    assert found is not None
    assert [rule.style.pieces for rule in found.rules] == [(64, 64, 64), (96, 96), ()]
    assert [rule.pattern for rule in found.rules] == [rule.pattern for rule in plan.rules]


def test_pieces_of_one_parameter_become_the_twins() -> None:
    cut = Held(Shard(1), (768, 768, 768))
    plan = Plan(
        "gpt2",
        (Rule("transformer.h.*.attn.c_attn", Style(StyleName.COLWISE, parameters=(("weight", cut),))),),
    )
    found = plan_for_twin(plan, find_model("hf:gpt2"), TP)
    assert found is not None
    assert found.rules[0].style.parameters == (("weight", Held(Shard(1), (64, 64, 64))),)


def test_sizes_that_are_not_the_models_stay_as_they_are() -> None:
    wrong = Rule("model.layers.*.self_attn.qkv_proj", Style(StyleName.COLWISE, pieces=(3000, 3216, 3000)))
    assert plan_for_twin(Plan("p", (wrong,)), find_model("hf:phi3"), TP) == Plan("p", (wrong,))


def test_a_plan_without_sizes_needs_none() -> None:
    assert plan_for_twin(builtin_plan("rowwise"), find_model("hf:llama"), TP) is None
