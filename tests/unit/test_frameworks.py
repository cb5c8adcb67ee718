"""Models of other frameworks: found by their prefix; a line where one isn't there, or isn't known."""

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from torch import nn

from shardwise.core.errors import ModelError, OptionError
from shardwise.core.plan import TheirPlan
from shardwise.models.frameworks import frameworks
from shardwise.models.frameworks.framework import Framework, FrameworkModel
from shardwise.models.self_sharded import SelfSharded, ShardsItself, sharding_source
from shardwise.models.source import NAMINGS, find_model


def linear(framework: Framework, asked: str) -> ShardsItself:
    if asked != "linear":
        raise ModelError(f'model "{framework.named(asked)}": it has none of that name.')
    return FrameworkModel(framework, asked, "a layer", lambda mesh: SelfSharded(nn.Linear(2, 3)))


# torch stands for a framework: it is installed
TORCH = version("torch")
INSTALLED = Framework("some", "Some", "torch", "some", (TORCH,), (), linear)


def test_a_framework_that_is_not_installed_is_one_line() -> None:
    missing = replace(INSTALLED, distribution="some-framework-that-is-not-there")
    with pytest.raises(ModelError) as caught:
        missing.model("linear")
    assert str(caught.value) == (
        "model \"some:linear\": Some isn't installed. Try: pip install 'shardwise[some]'."
    )


def test_a_version_that_was_not_tried_is_a_note_and_stands_beside_what_it_raises() -> None:
    assert INSTALLED.model("linear").notes == ()
    older = replace(INSTALLED, tried=("0.1", "0.2"))
    doubt = f"Some {TORCH} wasn't tried; 0.1, 0.2 were."
    assert older.model("linear").notes == (doubt,)

    def broken(mesh: object) -> nn.Module:
        raise AttributeError("no such plan")

    with pytest.raises(ModelError) as caught:
        FrameworkModel(older, "linear", "a layer", broken).build(dtype=torch.float32)
    found = f"Some {TORCH} can't build it: AttributeError: no such plan. {doubt}"
    assert str(caught.value) == f'model "some:linear": {found}'


def test_a_framework_s_model_shards_itself() -> None:
    model = INSTALLED.model("linear")
    assert model.default_plan == TheirPlan.OWN
    assert sharding_source(model) is model
    built = model.build(dtype=torch.bfloat16)
    assert {(each.dtype, each.device.type) for each in built.parameters()} == {(torch.bfloat16, "meta")}
    with pytest.raises(OptionError, match="doesn't shard itself"):
        sharding_source(find_model("llama3-debug"))


@pytest.mark.parametrize("framework", frameworks(), ids=lambda each: each.prefix)
def test_each_framework_says_how_its_models_are_named_and_which_extra_installs_it(
    framework: Framework,
) -> None:
    assert framework.tried
    assert set(framework.namings) <= set(NAMINGS)
    assert all(naming.startswith(f"{framework.prefix}:") for naming, _ in framework.namings)
