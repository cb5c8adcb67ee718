"""The small twin of a Hugging Face configuration: the same kinds of layers and modules, so the same plan, at
sizes a laptop runs in float64.

What decides whether a plan is right stays: which modules there are, grouped heads, experts and their groups,
low ranks, tied weights, biases, each kind of layer once. Sizes become small, and divide where a plan divides
them: by tp, as heads, experts and widths of real models do. Names of sizes are transformers' own;
attribute_map has its synonyms.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

HEAD_DIM = 16
EXPERTS_PER_TOKEN = 2
MOST_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Small sizes of a model that is to be sharded over tp ranks: each rank has two heads and one KV head, or
    more."""

    tp: int

    @property
    def _unit(self) -> int:
        return max(2, self.tp)

    @property
    def heads(self) -> int:
        return 2 * self._unit

    @property
    def kv_heads(self) -> int:
        return self._unit

    @property
    def hidden(self) -> int:
        return self.heads * HEAD_DIM

    @property
    def vocab(self) -> int:
        return 64 * self._unit

    @property
    def width(self) -> int:
        return 48 * self._unit

    @property
    def expert_width(self) -> int:
        return 16 * self._unit

    @property
    def experts(self) -> int:
        return 2 * self._unit

    def of(self, name: str) -> int | None:
        """The size of that name, if it is one of those that have one of their own."""
        return _FIXED.get(name) or {
            "vocab_size": self.vocab,
            "vocab_size_per_layer_input": self.vocab,
            "unpadded_vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "swa_num_attention_heads": self.heads,
            "num_attention_heads_per_layer": self.heads,
            "encoder_attention_heads": self.heads,
            "decoder_attention_heads": self.heads,
            "index_n_heads": self.heads,
            "linear_num_key_heads": self.kv_heads,
            "linear_num_value_heads": self.heads,
            "linear_num_heads": self.heads,
            "mamba_n_heads": 2 * self.heads,
            "mamba_num_heads": 2 * self.heads,
            "mamba_d_ssm": 2 * self.hidden,
        }.get(name)

    def missing(self, name: str) -> int | None:
        """What a default configuration leaves open and some model can't be built without."""
        return {
            "head_dim": HEAD_DIM,
            "num_key_value_heads": self.heads,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "num_local_experts": self.experts,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "indexer_n_heads": self.heads,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }.get(name)


_FIXED = {
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 4,
    "hidden_size_per_layer_input": 16,
    "ple_embed_dim": 32,
    "head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "rotary_dim": HEAD_DIM // 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "index_head_dim": HEAD_DIM,
    "index_topk": 4,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_head_dim": HEAD_DIM,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_d_head": HEAD_DIM,
    "mamba_head_dim": HEAD_DIM,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "block_size": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "rel_extent": 16,
    "hc_lowrank": 8,
    "laurel_rank": 8,
    "gated_norm_rank": 8,
}
_AT_MOST = {
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "num_experts_per_token": EXPERTS_PER_TOKEN,
    "moe_topk": EXPERTS_PER_TOKEN,
    "moe_k": EXPERTS_PER_TOKEN,
    "num_layers_per_stack": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "image_token_id": 3,
    "audio_token_id": 4,
}
# another name for a size, where a configuration has both
_SAME = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num|num_routed_experts)$"
)
_SHARED_EXPERTS = re.compile(r"^(n_shared_experts|num_shared_experts|moe_num_shared_experts)$")
_KV_HEADS = re.compile(r"^(swa_|global_)?num_(global_)?key_value_heads$")
_WIDTH = re.compile(r"(intermediate|ffn_hidden)_size|ffn_dim")
_TOKEN_ID = re.compile(r"token_id$")
# layers below or above a number are of another kind
_FIRST_LAYERS = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$")


def small_values(config: Any, tp: int) -> dict[str, Any]:
    """A configuration's values with sizes for tp ranks, for its class's from_dict(). config: one of
    transformers'; it isn't changed."""
    values = _without_internals(config.to_dict())
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None and hasattr(part, "to_dict"):
            values[key] = small_values(part, tp)
    names = {own: canonical for canonical, own in config.attribute_map.items()}
    known = {names.get(key, key): value for key, value in values.items()}
    layers = _kept_layers(known)
    twin = _Twin(Sizes(tp), known, layers)
    found = {key: twin.value(names.get(key, key), value) for key, value in values.items()}
    kept = (key for key, value in found.items() if value != values[key] or not _is_derived(config, key))
    return {key: found[key] for key in kept}


def _is_derived(config: Any, key: str) -> bool:
    """Whether a configuration makes a number or a list itself, of what it is asked for."""
    asked = getattr(type(config), "__dataclass_fields__", None)
    return asked is not None and key not in asked and type(getattr(config, key, None)) in (int, list)


def _without_internals(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: deepcopy(value)
        for key, value in values.items()
        if not key.startswith("_") and key != "transformers_version"
    }


@dataclass(frozen=True, slots=True)
class _Layers:
    """How many layers there are, and which are kept: the first of each kind, two at least."""

    depth: int
    kept: tuple[int, ...]


def _kept_layers(known: Mapping[str, Any]) -> _Layers | None:
    """None where the depth has no name that is known."""
    depth = known.get("num_hidden_layers", known.get("num_layers"))
    if not isinstance(depth, int):
        return None
    kinds = known.get("layer_types") or known.get("layers_block_type")
    kinds = kinds if isinstance(kinds, list) and len(kinds) == depth else [""] * depth
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = [layer for layer in range(depth) if layer not in first]
    return _Layers(depth, tuple(sorted((first + others)[: min(depth, max(2, min(MOST_LAYERS, len(first))))])))


@dataclass(frozen=True, slots=True)
class _Twin:
    """known: the configuration's own values by canonical name. layers: which are kept, where lists have an
    entry for each."""

    sizes: Sizes
    known: Mapping[str, Any]
    layers: _Layers | None

    def value(self, name: str, value: Any) -> Any:
        layers = self.layers
        match value:
            case bool() | float() | str():
                return value
            case int():
                return self._number(name, value) if value > 0 else value
            case None:
                return self.sizes.missing(name)
            case dict() if name == "per_layer_config" and layers is not None:
                parts = {int(layer): part for layer, part in value.items()}
                inner = replace(self, layers=None)
                return {
                    place: inner.value("", parts[layer])
                    for place, layer in enumerate(layers.kept)
                    if layer in parts
                }
            case dict():
                inner = replace(self, known={**self.known, **value})
                return {key: inner.value(key, each) for key, each in value.items()}
            case list() if layers is not None and len(value) == layers.depth:
                return [replace(self, layers=None).value(name, value[layer]) for layer in layers.kept]
            case list() if (
                layers is not None and name.endswith("layers") and all(type(item) is int for item in value)
            ):
                return [
                    item for item in value if item < len(layers.kept)
                ]  # the numbers of the layers that are of some kind
            case list():
                return [replace(self, layers=None).value(name, item) for item in value]
            case _:
                return value

    def _number(self, name: str, value: int) -> int:
        sizes, known = self.sizes, self.known
        if name in ("num_hidden_layers", "num_layers") and self.layers is not None:
            return len(self.layers.kept)
        if (
            name == "head_dim" and "qk_nope_head_dim" in known
        ):  # latent attention: of the rotated part, or of both
            return _FIXED[
                "qk_rope_head_dim" if value == known.get("qk_rope_head_dim", value) else "qk_head_dim"
            ]
        same = _SAME.get(name, "")
        if same and value == known.get(same):
            return self._number(same, value)
        if name == "hidden_size" and "qk_dim_factor" in known:  # its shares are made multiples of 64 first
            return -(-sizes.hidden // int(64 / known["qk_dim_factor"])) * int(64 / known["qk_dim_factor"])
        if name == "linear_num_key_heads" and value == known.get("linear_num_value_heads"):
            return sizes.heads
        if _KV_HEADS.match(name):
            return sizes.heads if value == known.get("num_attention_heads") else min(value, sizes.kv_heads)
        if name in _AT_MOST:
            return min(value, _AT_MOST[name])
        if _EXPERTS.match(name):
            return min(value, sizes.experts)
        if _SHARED_EXPERTS.match(name) or _FIRST_LAYERS.match(name):
            return 1
        if _WIDTH.search(name):
            return sizes.expert_width if "moe" in name or "expert" in name else sizes.width
        if _TOKEN_ID.search(name):
            return min(value, sizes.vocab - 1)
        return sizes.of(name) or value
