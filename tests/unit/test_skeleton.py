"""A model without its weights: parameters on meta, and all else as its code makes it."""

import pytest
import torch
from torch import Tensor, nn

from shardwise.models import init
from shardwise.models.dtype import default_dtype
from shardwise.models.factory import FactoryModel
from shardwise.models.init import initial_parameter, own_weights
from shardwise.models.skeleton import build_without_weights
from shardwise.models.source import find_model
from shardwise.step.build import build_model
from tests.matrix import thinned

CPU = torch.device("cpu")


class Tables(nn.Module):
    """Tied head, a buffer and a plain tensor that are computed, a frozen parameter, one that two modules
    take, one that is set later."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.words.weight
        self.positions: Tensor
        self.register_buffer("positions", torch.arange(8.0) / 3, persistent=False)
        self.mask = torch.ones(8, 8).tril()
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        shared = nn.Parameter(torch.ones(3))
        self.one, self.other = nn.Module(), nn.Module()
        self.one.scale, self.other.scale = shared, shared
        self.words.extra = nn.Parameter(torch.ones(5))
        nn.init.normal_(self.words.weight)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.words(ids))
        return logits


def tables() -> FactoryModel:
    return FactoryModel("tables", Tables, frozenset(), False)


def test_parameters_are_on_meta_and_all_that_was_computed_is_real() -> None:
    model = build_without_weights(tables(), dtype=torch.float32, device=CPU, seed=0)
    assert isinstance(model, Tables)
    assert {name for name, each in model.named_parameters() if each.is_meta} == {
        "words.weight",
        "words.extra",
        "frozen",
        "one.scale",
    }
    assert model.head.weight is model.words.weight
    assert model.one.scale is model.other.scale
    assert not model.frozen.requires_grad
    assert torch.equal(model.positions, Tables().positions)
    assert torch.equal(model.mask, torch.ones(8, 8).tril())


def test_modules_made_afterwards_keep_their_weights() -> None:
    build_without_weights(tables(), dtype=torch.float32, device=CPU, seed=0)
    assert not nn.Linear(2, 2).weight.is_meta


def test_own_weights_are_those_of_the_model_s_code_and_copies() -> None:
    whole = own_weights(tables(), seed=3, dtype=torch.float32, device=CPU)
    torch.manual_seed(3)
    expected = Tables().words.weight
    first = whole("words.weight", expected.shape)
    assert torch.equal(first, expected)
    first.zero_()
    assert torch.equal(whole("head.weight", expected.shape), expected)


def test_a_model_that_is_built_for_a_step_has_its_own_initial_weights_and_buffers() -> None:
    model = build_model(tables(), None, None, dtype=torch.float64, device=CPU, seed=3)
    torch.manual_seed(3)
    with default_dtype(torch.float64):
        expected = Tables()
    assert model.training
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.get_buffer("positions"), expected.positions)


def test_a_model_that_is_too_large_for_that_has_random_weights_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(init, "MOST_OWN", 10)
    model = build_model(tables(), None, None, dtype=torch.float64, device=CPU, seed=3)
    table = model.get_parameter("words.weight")
    assert torch.equal(
        table, initial_parameter("words.weight", table.shape, seed=3, dtype=torch.float64, device=CPU)
    )


TYPES = ("llama", "gpt2", "gemma2", "falcon_h1", "bloom", "gpt_neox", "mamba", "deepseek_v3", "rwkv", "opt")


@pytest.mark.parametrize("name", thinned(TYPES, lambda name: name in ("llama", "gpt2")))
def test_a_hugging_face_model_has_the_buffers_of_a_real_one(name: str) -> None:
    source = find_model(f"hf:{name}").small(2)
    assert source is not None
    torch.manual_seed(0)
    real = source.build(dtype=torch.float32, device="cpu")
    empty = build_without_weights(source, dtype=torch.float32, device=CPU, seed=0)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = [(key, each.shape) for key, each in empty.named_parameters()]
    assert shapes == [(key, each.shape) for key, each in real.named_parameters()]
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    for key, each in real.named_buffers():
        assert torch.equal(buffers[key], each), key
