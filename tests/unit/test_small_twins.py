"""Small twins: the modules of the large model, at sizes that divide."""

from typing import Any

import pytest
import torch

from shardwise.dims.trace import record_of
from shardwise.models.source import find_model, vocab_size_of
from shardwise.models.specs import SPECS

pytest.importorskip(
    "transformers",
    reason="transformers isn't installed, so NO TWIN OF ITS MODELS WAS BUILT: pip install shardwise[hf]",
)


def twin(name: str, tp: int = 2) -> Any:
    small = find_model(name).small(tp)
    assert small is not None
    return small.build(dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "hf:llama",
        "hf:qwen3",
        "hf:mixtral",
        "hf:deepseek_v3",
        "hf:gemma4_text",
        "hf:bamba",
        "hf:jamba",
        "hf:gpt_oss",
    ],
)
def test_a_twin_has_the_modules_and_the_plan_of_its_model(name: str) -> None:
    small: Any = twin(name)
    large: Any = find_model(name).build(dtype=torch.float32)
    kinds = {type(module).__name__ for module in small.modules()}
    assert kinds == {type(module).__name__ for module in large.modules()}
    assert small.tp_plan == large.tp_plan
    assert sum(parameter.numel() for parameter in small.parameters()) < 1_000_000


def test_each_kind_of_layer_is_kept_once() -> None:
    config = twin("hf:qwen3_next").config
    assert config.layer_types == ["linear_attention", "full_attention"]


def test_what_a_configuration_makes_itself_is_made_of_the_small_sizes() -> None:
    """zamba2 keeps the width of a mamba head, which it computes, beside what it is of."""
    config = twin("hf:zamba2").config
    assert config.mamba_headdim * config.n_mamba_heads == config.mamba_expand * config.hidden_size
    assert config.attention_hidden_size == 2 * config.hidden_size


@pytest.mark.parametrize("name", ["hf:zamba2", "hf:xlstm", "hf:recurrent_gemma"])
def test_a_recurrent_twin_runs(name: str) -> None:
    small = twin(name)
    assert record_of(small, vocab_size_of(small)).logits is not None


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
def test_heads_widths_experts_and_vocabulary_divide_by_tp(tp: int) -> None:
    config = twin("hf:mixtral", tp).config
    for size in (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.num_local_experts,
        config.vocab_size,
    ):
        assert size % tp == 0
    assert config.num_attention_heads > config.num_key_value_heads


def test_what_keeps_a_plan_from_fitting_stays() -> None:
    assert twin("hf:llama?num_key_value_heads=1").config.num_key_value_heads == 1
    assert twin("hf:llama?num_key_value_heads=32").config.num_key_value_heads == 4  # as many as heads
    assert twin("hf:llama?tie_word_embeddings=true").config.tie_word_embeddings


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_twin_of_ours_is_grouped_as_its_model_is(name: str) -> None:
    whole, small = SPECS[name].config, SPECS[name].small(3).config
    assert (small.n_heads, small.vocab_size % 3, small.ffn_hidden % 3) == (6, 0, 0)
    assert (small.n_kv_heads == small.n_heads) == (whole.n_kv_heads == whole.n_heads)
    kept = ("rope_scaling", "tied", "max_seq")
    assert [getattr(small, key, None) for key in kept] == [getattr(whole, key, None) for key in kept]


def test_nobody_knows_a_twin_of_your_own_model() -> None:
    assert find_model("tests.distributed.verify_models:by_hand_right").small(2) is None
