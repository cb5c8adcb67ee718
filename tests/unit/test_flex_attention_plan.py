"""A plan for a model whose attention is flex attention, which runs on no device without data."""

import pytest

from shardwise.core.errors import ModelError
from shardwise.core.mesh import Mesh
from shardwise.core.plan import StyleName
from shardwise.models.source import find_model
from shardwise.planner.make import Wish, make_plan

MODELS = "tests.unit.flex_attention_models"


def test_heads_of_flex_attention_are_cut_as_those_of_any_attention() -> None:
    made = make_plan(find_model(f"{MODELS}:by_documents"), Wish(Mesh.parse("tp=2")))
    styles = {rule.pattern: rule.style.name for rule in made.plan.rules}
    assert {styles[f"attention.{name}"] for name in "qkv"} == {StyleName.COLWISE}
    assert styles["attention.o"] is StyleName.ROWWISE
    assert not made.whole


def test_heads_that_a_function_may_tell_apart_are_not_cut() -> None:
    made = make_plan(find_model(f"{MODELS}:with_slopes"), Wish(Mesh.parse("tp=2")))
    (sinks,) = (each for each in made.whole if each.pattern == "attention.sinks")
    assert "flex_attention's functions may tell the heads apart" in sinks.reason


def test_an_op_that_takes_functions_and_that_nobody_described_is_named() -> None:
    with pytest.raises(ModelError, match="nobody described what cond does with its functions"):
        make_plan(find_model(f"{MODELS}:by_a_condition"), Wish(Mesh.parse("tp=2")))
