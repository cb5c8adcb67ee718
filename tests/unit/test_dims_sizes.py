"""Integers that know where they come from."""

import copy
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.dims.sizes import (
    Attribute,
    Computed,
    Expression,
    Length,
    Size,
    attributes_in,
    evaluate,
    expression_of,
    tagged,
)
from shardwise.dims.trace import record_of

HEADS = Attribute("attention", "heads", 8)
WIDTH = Attribute("attention", "config.width", 16)
ATTRIBUTES = {HEADS: 8, WIDTH: 16}


def value_of(known: Attribute | Length) -> int:
    assert isinstance(known, Attribute)
    return ATTRIBUTES[known]


def computed(data: st.DataObject) -> Any:
    """A number as a forward would work it out: from attributes and plain numbers, step by step."""
    found: Any = Size.of(HEADS.value, HEADS)
    for what in data.draw(st.lists(st.sampled_from("+-*/%r"), max_size=6)):
        other = data.draw(st.sampled_from([2, 3, 5, Size.of(WIDTH.value, WIDTH)]))
        match what:
            case "+":
                found = found + other
            case "-":
                found = other - found if data.draw(st.booleans()) else found - other
            case "*":
                found = other * found
            case "/":
                found = found // other
            case "%":
                found = found % other
            case "r":
                found = -found
    return found


@given(st.data())
def test_what_python_computes_from_a_size_is_one_and_can_be_worked_out_again(data: st.DataObject) -> None:
    number = computed(data)
    assert isinstance(number, Size)
    assert evaluate(number.expression, value_of) == int(number)
    assert HEADS in set(attributes_in(number.expression))


def test_an_expression_is_worked_out_anew_for_a_rank_s_part() -> None:
    number = Size.of(16, WIDTH) // Size.of(8, HEADS) + 3
    halved = {HEADS: 4, WIDTH: 16}
    assert evaluate(number.expression, lambda known: halved[known]) == 7  # type: ignore[index]


def test_a_size_in_a_torch_size_keeps_its_expression() -> None:
    shape = torch.Size([2, Size.of(8, HEADS), 3])
    assert expression_of(shape[1]) == HEADS
    assert expression_of((*shape[:-1], 4)[1]) == HEADS
    assert expression_of(shape[0]) == 2


def test_a_size_is_an_int_for_everybody_else() -> None:
    size = Size.of(8, HEADS)
    assert size == 8
    assert hash(size) == hash(8)
    assert isinstance(size / 2, float)
    assert torch.zeros(size).shape == (8,)
    assert list(range(size)) == list(range(8))


def test_what_isn_t_an_int_makes_no_size() -> None:
    size = Size.of(8, HEADS)
    assert type(size * 0.5) is float
    assert torch.equal(size * torch.ones(2), torch.full((2,), 8.0))
    with pytest.raises(TypeError):
        size + "a"


# ------------------------------------------------------------------------------------------------- of a model


class Configuration:
    def __init__(self) -> None:
        self.num_heads, self.sizes, self.name, self.is_fast = 4, [3, 5], "x", True


class Inner(nn.Module):
    def __init__(self, config: Configuration) -> None:
        super().__init__()
        self.config, self.heads, self.scale, self.is_causal = config, 4, 0.5, True
        self.sections, self.pair = [8, 24], (1, 2)
        self.cache: dict[str, int] = {"x": 3}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Configuration()
        self.inner, self.width = Inner(self.config), 7
        self.linear = nn.Linear(4, 6)


def found_in(model: nn.Module) -> dict[str, Expression]:
    """Each number that a forward could read and that knows where it comes from."""
    inner: Any = model.get_submodule("inner")
    read = {
        "heads": inner.heads,
        "config.num_heads": inner.config.num_heads,
        "config.sizes[1]": inner.config.sizes[1],
        "sections[0]": inner.sections[0],
        "pair[1]": inner.pair[1],
        "width": model.width,
        "scale": inner.scale,
        "is_causal": inner.is_causal,
        "config.is_fast": inner.config.is_fast,
        "cache": inner.cache["x"],
    }
    return {name: number.expression for name, number in read.items() if isinstance(number, Size)}


def test_integers_of_modules_configurations_and_lists_are_known_while_they_are_tagged() -> None:
    model = Outer()
    with tagged(model):
        assert found_in(model) == {
            "heads": Attribute("inner", "heads", 4),
            "config.num_heads": Attribute("inner", "config.num_heads", 4),
            "config.sizes[1]": Attribute("inner", "config.sizes[1]", 5),
            "sections[0]": Attribute("inner", "sections[0]", 8),
            "pair[1]": Attribute("inner", "pair[1]", 2),
            "width": Attribute("", "width", 7),
        }
        assert isinstance(model.inner.config, Configuration)
        assert model.config.num_heads.expression == Attribute("", "config.num_heads", 4)  # type: ignore[attr-defined]


def state(model: nn.Module) -> dict[str, list[tuple[str, int, str]]]:
    """What every module holds, by identity and by value."""
    return {
        name: [(key, id(value), repr(value)) for key, value in vars(module).items()]
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_as_it_was_once_it_isn_t_tagged_any_more(fails: bool) -> None:
    model = Outer()
    before, configuration = state(model), copy.deepcopy(vars(model.config))
    with suppress(RuntimeError), tagged(model):
        if fails:
            raise RuntimeError("in the forward")
    assert state(model) == before
    assert vars(model.config) == configuration
    assert found_in(model) == {}


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.options = 4, SimpleNamespace(width=8)
        self.embed = nn.Embedding(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids).view(2, 24, self.heads, 3)  # type: ignore[no-any-return]


def test_a_model_whose_forward_fails_under_the_trace_is_as_it_was() -> None:
    with torch.device("meta"):
        model = Failing()
    before = state(model)
    with pytest.raises(ModelError):
        record_of(model, 16)
    assert state(model) == before


def test_two_readers_of_one_computation_agree() -> None:
    number = Size.of(8, HEADS) * 2
    assert number.expression == Computed(number.expression.what, HEADS, 2)
