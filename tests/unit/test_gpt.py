"""The GPT family: exact sizes, the same logits as Hugging Face's, heads that a contiguous part of QKV holds
whole, errors, initial weights."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.core.errors import ModelError, PlanError
from shardwise.core.plan import Family
from shardwise.models.gpt import GPT, GPTConfig
from shardwise.models.init import initial_parameter
from shardwise.models.specs import get_spec
from shardwise.parallel.builtin import builtin_plan
from shardwise.parallel.resolve import resolve

CONFIG = GPTConfig(97, 96, 2, 12, 160, 64)


def published(hidden: int, layers: int) -> int:
    """Narayanan et al. 2021, equation 2, for vocabulary 51,200 and 2048 positions; beside it the last norm,
    which it leaves out."""
    return 12 * layers * hidden**2 + 13 * layers * hidden + (51_200 + 2048) * hidden + 2 * hidden


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "billions"),
    [
        ("gpt3-1.3b", 2048, 24, 1.3),
        ("gpt3-6.7b", 4096, 32, 6.7),
        ("gpt3-175b", 12_288, 96, 175),
        ("megatron-22b", 6144, 48, 22),
    ],
)
def test_a_model_has_exactly_the_published_number_of_parameters(
    name: str, hidden: int, layers: int, billions: float
) -> None:
    spec = get_spec(name)
    count = sum(parameter.numel() for parameter in spec.build().parameters())
    assert spec.config.n_parameters == count == published(hidden, layers)
    assert count / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_counts_once(tied: bool) -> None:
    config = replace(CONFIG, tied=tied)
    model = GPT(config)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_parameters
    assert config.n_parameters - replace(config, vocab_size=0).n_parameters == (1 if tied else 2) * 97 * 96


def test_heads_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        replace(CONFIG, hidden=100)
    assert str(caught.value) == "gpt: hidden 100 is no multiple of 12 heads."


def test_a_sequence_without_positions_is_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        GPT(CONFIG)(torch.zeros(1, 65, dtype=torch.int64))
    assert (
        str(caught.value)
        == "gpt: a sequence of 65, and learned positions for 64. Use a shorter one, or max_seq=65."
    )


def filled(config: GPTConfig) -> GPT:
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
    return model


def some_ids() -> Tensor:
    return torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(1))


def hugging_face(model: GPT) -> Any:
    """The same model as transformers has it, with the same weights: transposed, and all queries before all
    keys before all values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq,
            n_embd=config.hidden,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.ffn_hidden,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    state = {}
    for name, tensor in model.state_dict().items():
        if "wqkv" in name:
            tensor = tensor.unflatten(0, (config.n_heads, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
        is_linear = tensor.dim() == 2 and name.startswith("layers")
        state[_hugging_face_name(name)] = tensor.T if is_linear else tensor
    theirs.load_state_dict(state)
    return theirs.eval()


def _hugging_face_name(name: str) -> str:
    if name.startswith(("output.", "norm.")):
        return name.replace("output.", "lm_head.").replace("norm.", "transformer.ln_f.")
    for ours, its in {
        "tok_embeddings": "wte",
        "pos_embeddings": "wpe",
        "layers": "h",
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
        "attention.wqkv": "attn.c_attn",
        "attention.wo": "attn.c_proj",
        "feed_forward.w1": "mlp.c_fc",
        "feed_forward.w2": "mlp.c_proj",
    }.items():
        name = name.replace(ours, its)
    return f"transformer.{name}"


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers isn't installed, so the logits are NOT compared with Hugging Face's: pip install "
    "shardwise[hf]",
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_those_of_transformers(tied: bool) -> None:
    model = filled(replace(CONFIG, tied=tied))
    with torch.no_grad():
        ours, theirs = model(some_ids()), hugging_face(model)(some_ids(), use_cache=False).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_a_contiguous_part_of_the_projections_is_some_whole_heads(tp: int) -> None:
    """What the parts of an attention give adds up to what the whole gives."""
    whole = filled(CONFIG).layers[0].get_submodule("attention").double()
    hidden_BSH = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = whole.state_dict()
    total = state["wo.bias"].clone()
    for rank in range(tp):
        part = filled(CONFIG).layers[0].get_submodule("attention").double()
        for name, dim in (("wqkv", 0), ("wo", 1)):
            part.get_submodule(name).weight = torch.nn.Parameter(state[f"{name}.weight"].chunk(tp, dim)[rank])
        part.get_submodule("wqkv").bias = torch.nn.Parameter(state["wqkv.bias"].chunk(tp)[rank])
        part.get_submodule("wo").register_parameter("bias", None)
        total = total + part(hidden_BSH)
    torch.testing.assert_close(total, whole(hidden_BSH), rtol=0, atol=1e-12)


def test_a_token_sees_no_later_one() -> None:
    model, ids_BS = filled(CONFIG), some_ids()
    changed_BS = ids_BS.clone()
    changed_BS[0, 12] = 96 - ids_BS[0, 12]
    with torch.no_grad():
        before, after = model(ids_BS), model(changed_BS)
    torch.testing.assert_close(before[0, :12], after[0, :12], rtol=0, atol=0)
    assert (before[0, 12:] != after[0, 12:]).any()


@pytest.mark.parametrize(("tp", "sizes"), [(8, "{1, 2, 3, 4, 6, 12}"), (9, "{1, 2, 3, 4, 6, 12}")])
def test_heads_of_a_fused_projection_are_counted_as_heads(tp: int, sizes: str) -> None:
    """At tp=9 its 36 heads' worth of rows divide, and the heads don't."""
    with pytest.raises(PlanError) as caught:
        resolve(GPT(CONFIG), builtin_plan("rowwise", family=Family.GPT), tp=tp)
    assert str(caught.value) == (
        'plan "rowwise": rule "layers.*.attention.wqkv" (colwise) splits 12 heads of layers.0.attention '
        f"over tp={tp}. Use tp in {sizes}."
    )


def test_biases_start_at_zero_and_norms_at_one() -> None:
    for name, value in (("layers.0.attention.wqkv.bias", 0.0), ("norm.bias", 0.0), ("norm.weight", 1.0)):
        drawn = initial_parameter(
            name, torch.Size((8,)), seed=0, dtype=torch.float32, device=torch.device("cpu")
        )
        assert drawn.tolist() == [value] * 8
