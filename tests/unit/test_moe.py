"""Mixtures of experts: exact sizes, the same logits as Hugging Face's, what each token's experts compute,
ties, dropped assignments, experts without a token; balanced loads where nothing is known."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.core.errors import ModelError
from shardwise.models.dtype import default_dtype
from shardwise.models.moe import Experts, MixtureOfExperts, MoE, MoEConfig, Router
from shardwise.models.routing import balanced, counts_of, ends_of
from shardwise.models.specs import get_spec
from shardwise.torch_private import FakeTensorMode

CONFIG = MoEConfig(97, 96, 2, 12, 4, 40, n_experts=6, top_k=2, qk_norm=True)


def filled(module: torch.nn.Module, scale: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, scale, generator=generator)
    return module.double()


def some_hidden(batch: int = 2, seq: int = 7, *, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, seq, CONFIG.hidden, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(grad)


def one_by_one(experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each token's experts, token by token, as the formula has it."""
    rows = []
    for token in range(len(hidden)):
        out = torch.zeros_like(hidden[token])
        for choice in range(index.shape[1]):
            expert = int(index[token, choice])
            if expert == experts.num_experts:
                continue
            inner = F.silu(experts.w1[expert] @ hidden[token]) * (experts.w3[expert] @ hidden[token])
            out = out + weights[token, choice] * (experts.w2[expert] @ inner)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "billions"), [("moe-debug", 0.0553), ("mixtral-8x7b", 46.7), ("qwen3-30b-a3b", 30.53)]
)
def test_a_model_has_exactly_the_published_number_of_parameters(name: str, billions: float) -> None:
    spec = get_spec(name)
    count = sum(parameter.numel() for parameter in spec.build().parameters())
    assert spec.config.n_parameters == count
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)


def test_more_choices_than_experts_are_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        replace(CONFIG, top_k=7)
    assert str(caught.value) == "moe: a token goes to 7 of 6 experts. Use top_k of at most 6."


@pytest.mark.parametrize("capacity", [0.0, 0.6])
def test_a_mixture_is_what_each_tokens_experts_compute(capacity: float) -> None:
    config = replace(CONFIG, capacity=capacity)
    layer = filled(MixtureOfExperts(config))
    hidden = some_hidden()
    index, weights = layer.router(hidden)
    assert bool((index == config.n_experts).any()) == bool(capacity)
    expected = one_by_one(layer.experts, hidden.flatten(0, 1), index, weights).view_as(hidden)
    inputs = [hidden, *layer.parameters()]
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-12, atol=1e-12)
    seen = torch.autograd.grad(layer(hidden).square().sum(), inputs)
    right = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(seen, right, rtol=1e-10, atol=1e-10)


def test_an_expert_without_a_token_has_a_gradient_of_zeros() -> None:
    experts = filled(Experts(CONFIG))
    hidden = some_hidden().flatten(0, 1)
    index = torch.full((len(hidden), 1), 3)
    experts(hidden, index, hidden.new_ones(index.shape)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        has_some = parameter.grad.flatten(1).abs().sum(1) > 0
        assert has_some.tolist() == [expert == 3 for expert in range(6)]


def test_no_tokens_at_all_give_no_rows_and_gradients_of_zeros() -> None:
    experts = filled(Experts(CONFIG))
    none = torch.zeros(0, CONFIG.hidden, dtype=torch.float64, requires_grad=True)
    out = experts(none, torch.zeros(0, 1, dtype=torch.int64), none.new_ones(0, 1))
    assert out.shape == none.shape
    out.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_experts_of_equal_probability_are_chosen_alike_at_every_run() -> None:
    router = filled(Router(CONFIG))
    with torch.no_grad():
        router.gate.weight.zero_()
    first, again = router(some_hidden()), router(some_hidden())
    assert torch.equal(first[0], again[0])
    assert (first[0] == first[0][0]).all()
    torch.testing.assert_close(first[1], torch.full_like(first[1], 0.5))


def test_a_sequence_drops_what_is_beyond_an_experts_capacity_whatever_the_batch() -> None:
    router = filled(Router(replace(CONFIG, capacity=0.75)))
    hidden = some_hidden(3, 8)
    index, weights = router(hidden)
    most = 2  # ceil(0.75 x 8 x 2 / 6)
    for sequence in index.view(3, -1):
        counts = torch.bincount(sequence, minlength=7)
        assert counts[:6].max() <= most
    assert (weights[index == 6] == 0).all()
    assert (index == 6).any()
    alone = torch.cat([router(hidden[at : at + 1])[0] for at in range(3)])
    assert torch.equal(index, alone)


def test_loads_are_counted_where_ids_are_real_and_balanced_where_they_are_not() -> None:
    chosen = torch.tensor([0, 0, 2, 2, 2, 4])
    assert ends_of(chosen, 4).tolist() == [2, 2, 5, 5]
    assert counts_of(chosen, 4) == [2, 0, 3, 0]
    assert balanced(6, 4) == [2, 2, 1, 1]
    assert counts_of(chosen.to("meta"), 4) == [2, 2, 1, 1]
    with FakeTensorMode() as fakes:
        assert counts_of(fakes.from_tensor(chosen), 4) == [2, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_fake_tensors_has_the_shapes_of_a_real_one(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        with default_dtype(dtype):
            model = MoE(replace(CONFIG, capacity=2.0))
        logits = model(torch.zeros(2, 8, dtype=torch.int64))
        assert logits.shape == (2, 8, 97)
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_grouped_matmuls_give_what_the_loop_gives() -> None:
    experts = filled(Experts(CONFIG), 0.1).bfloat16()
    hidden = some_hidden(grad=False).flatten(0, 1).bfloat16()
    index, weights = filled(Router(CONFIG))(some_hidden(grad=False))
    grouped = experts(hidden, index, weights.bfloat16())
    looped = experts.float()(hidden.float(), index, weights.float())
    torch.testing.assert_close(grouped.float(), looped, rtol=0.05, atol=0.02)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="wants transformers")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_logits_are_those_of_hugging_faces_model(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = replace(CONFIG, qk_norm=kind == "qwen3_moe", head_width=16)
    ours = filled(MoE(config), 0.2)
    sizes = {
        "vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "mixtral":
        sizes |= {"intermediate_size": 40, "num_local_experts": 6}
    else:
        sizes |= {"moe_intermediate_size": 40, "num_experts": 6, "norm_topk_prob": True}
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes), experts_implementation="eager"
    ).double()
    state = {}
    for name, tensor in ours.state_dict().items():
        if name.endswith("experts.w1"):
            fused = torch.cat((tensor, ours.get_parameter(name.replace("w1", "w3"))), 1)
            state[theirs_of(name.replace("w1", "gate_up_proj"))] = fused
        elif not name.endswith("experts.w3"):
            state[theirs_of(name)] = tensor
    theirs.load_state_dict(state)
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(2))
    # theirs has angles, norms and probabilities in float32
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=2e-5)


def theirs_of(name: str) -> str:
    """Our name of a parameter as transformers has it."""
    for ours, theirs in (
        ("tok_embeddings", "model.embed_tokens"), ("layers.", "model.layers."), ("output.", "lm_head."),
        ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ("attention.w", "self_attn.w"), ("attention.", "self_attn."), ("feed_forward", "mlp"),
        ("router.gate", "gate"), ("experts.w2", "experts.down_proj"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    for ours in "qkvo":
        name = name.replace(f"self_attn.w{ours}", f"self_attn.{ours}_proj")
    return "model.norm.weight" if name == "norm.weight" else name


def test_an_auxiliary_loss_is_the_product_of_two_means_and_enters_the_routers_gradient_alone() -> None:
    coefficient = 0.3
    layer = filled(MixtureOfExperts(replace(CONFIG, aux_loss=coefficient)))
    plain = filled(MixtureOfExperts(CONFIG))
    plain.load_state_dict(layer.state_dict())
    hidden = some_hidden()
    balance = layer.router.balance
    balance.begin(2)
    torch.testing.assert_close(layer(hidden), plain(hidden), rtol=0, atol=0)
    balance.begin(2)
    layer(hidden).square().sum().backward()
    probabilities = F.softmax(plain.router.gate(hidden).flatten(0, 1), -1)
    chosen = F.one_hot(plain.router(hidden)[0], 6).sum((0, 1)) / len(probabilities)
    auxiliary = coefficient * 6 * (chosen * probabilities.mean(0)).sum()
    torch.testing.assert_close(balance.value, auxiliary.detach() / 2)
    (plain(hidden).square().sum() + auxiliary / 2).backward()
    for (name, own), other in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_without_a_gradient_there_is_no_auxiliary_loss() -> None:
    router = filled(Router(replace(CONFIG, aux_loss=0.3)))
    with torch.no_grad():
        router(some_hidden())
    router.eval()
    router(some_hidden())
    assert router.balance.value is None
