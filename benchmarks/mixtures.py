"""Mixtures of experts of published runs, as their trainer builds them: attention, norms and experts of our
own models, with what those lack: DeepSeek's latent attention, experts that every token meets, and first
layers without experts.

Shapes are those of the models' published configurations (each names its source), which the runs' tables don't
repeat. What is left out: attention sinks, windows and biases of GPT-OSS; the router's groups and its
correction bias of DeepSeek (FLOPs and bytes of a router are small).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.plan import Plan, Rule, Style, StyleName
from shardwise.models.llama import FeedForward, LlamaConfig, rotate
from shardwise.models.moe import MixtureOfExperts, MoE, MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Widths of latent attention: of what queries, and keys with values, are made of; of a head's part
    without and with positions, and of its values."""

    queries: int
    keys: int
    plain: int = 128
    rotated: int = 64
    values: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One published model. shared: width of what every token meets beside its experts. dense: of the first
    layers' feed-forward, and how many they are."""

    source: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    experts: int
    top_k: int
    inner: int
    vocab: int
    latent: Latent | None = None
    shared: int = 0
    dense: int = 0
    dense_layers: int = 0
    qk_norm: bool = False

    def config(self) -> MoEConfig:
        return MoEConfig(
            self.vocab, self.hidden, self.layers, self.heads, self.kv_heads, self.inner, fused_swiglu=True,
            n_experts=self.experts, top_k=self.top_k, head_width=self.head, qk_norm=self.qk_norm,
        )  # fmt: skip


_V2 = "SimuMax, configs/models/deepseekv2.json, as DeepSeek-V2's config.json"
_V3 = "SimuMax, configs/models/deepseekv3.json, as DeepSeek-V3's config.json"
_CUT = "; four layers, the first without experts (docs/b200/b200_release_v1.2_summary.md)"
_LATENT = Latent(queries=1536, keys=512)
DEEPSEEK_V3 = Shape(
    source=_V3, layers=61, hidden=7168, heads=128, kv_heads=128, head=64, experts=256, top_k=8, inner=2048,
    vocab=129_280, latent=_LATENT, shared=2048, dense=18_432, dense_layers=3,
)  # fmt: skip
SHAPES = {
    "deepseekv2-cut4L": Shape(
        source=_V2 + _CUT, layers=4, hidden=5120, heads=128, kv_heads=128, head=64, experts=160, top_k=6,
        inner=1536, vocab=102_400, latent=_LATENT, shared=3072, dense=12_288, dense_layers=1,
    ),
    "deepseekv3-cut4L": Shape(
        source=_V3 + _CUT, layers=4, hidden=7168, heads=128, kv_heads=128, head=64, experts=256, top_k=8,
        inner=2048, vocab=129_280, latent=_LATENT, shared=2048, dense=18_432, dense_layers=1,
    ),
    "DeepSeekV3 (w/o MTP)": DEEPSEEK_V3,
    "GPT OSS 120B": Shape(
        source="gpt-oss-120b's config.json", layers=36, hidden=2880, heads=64, kv_heads=8, head=64,
        experts=128, top_k=4, inner=2880, vocab=201_088,
    ),
    "Qwen3_235B_a22B": Shape(
        source="Qwen3-235B-A22B's config.json", layers=94, hidden=4096, heads=64, kv_heads=4, head=128,
        experts=128, top_k=8, inner=1536, vocab=151_936, qk_norm=True,
    ),
}  # fmt: skip


class LatentAttention(nn.Module):
    """Queries, and keys with values, are made of short vectors; a part of each head has no positions.
    DeepSeek-AI 2024 (DeepSeek-V2), section 2.1."""

    def __init__(self, shape: Shape, latent: Latent, eps: float) -> None:
        super().__init__()
        self.latent = latent
        width = latent.plain + latent.rotated
        self.q_a = nn.Linear(shape.hidden, latent.queries, bias=False)
        self.q_norm = nn.RMSNorm(latent.queries, eps)
        self.q_b = nn.Linear(latent.queries, shape.heads * width, bias=False)
        self.kv_a = nn.Linear(shape.hidden, latent.keys + latent.rotated, bias=False)
        self.kv_norm = nn.RMSNorm(latent.keys, eps)
        self.kv_b = nn.Linear(latent.keys, shape.heads * (latent.plain + latent.values), bias=False)
        self.wo = nn.Linear(shape.heads * latent.values, shape.hidden, bias=False)

    def forward(self, hidden_BSH: Tensor, rope_2SD: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        latent = self.latent
        q_BSND = self.q_b(self.q_norm(self.q_a(hidden_BSH))).unflatten(
            -1, (-1, latent.plain + latent.rotated)
        )
        plain_q, rotated_q = q_BSND.split((latent.plain, latent.rotated), dim=-1)
        short_kv, rotated_k = self.kv_a(hidden_BSH).split((latent.keys, latent.rotated), dim=-1)
        kv_BSND = self.kv_b(self.kv_norm(short_kv)).unflatten(-1, (-1, latent.plain + latent.values))
        plain_k, v_BSND = kv_BSND.split((latent.plain, latent.values), dim=-1)
        rotated_k = rotate(rotated_k.unsqueeze(2), rope_2SD).expand(-1, -1, plain_k.shape[2], -1)
        q_BSND = torch.cat((plain_q, rotate(rotated_q, rope_2SD)), dim=-1)
        k_BSND = torch.cat((plain_k, rotated_k), dim=-1)
        out_BNSD = F.scaled_dot_product_attention(
            q_BSND.transpose(1, 2), k_BSND.transpose(1, 2), v_BSND.transpose(1, 2), is_causal=True
        )
        out: Tensor = self.wo(out_BNSD.transpose(1, 2).flatten(2))
        return out


class WithShared(MixtureOfExperts):
    """Beside its experts each token meets a feed-forward that all share."""

    def __init__(self, config: MoEConfig, shared: LlamaConfig) -> None:
        super().__init__(config)
        self.shared = FeedForward(shared)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        shared_BSH: Tensor = self.shared(hidden_BSH)
        return super().forward(hidden_BSH) + shared_BSH


class Mixture(MoE):
    """A published model of a shape; ids [B, S] -> logits [B, S, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.config())
        for index, layer in enumerate(self.layers):
            if shape.latent is not None:
                layer.attention = LatentAttention(shape, shape.latent, self.config.norm_eps)
            if index < shape.dense_layers:
                layer.feed_forward = FeedForward(_of_width(shape, shape.dense))
            elif shape.shared:
                layer.feed_forward = WithShared(shape.config(), _of_width(shape, shape.shared))


def _of_width(shape: Shape, inner: int) -> LlamaConfig:
    return LlamaConfig(
        shape.vocab, shape.hidden, shape.layers, shape.heads, shape.kv_heads, inner, fused_swiglu=True
    )


def plan_of(shape: Shape) -> Plan:
    """Experts shared out over ep; everything else whole on each rank."""
    whole: Any = Style(StyleName.WHOLE)
    modules = ["tok_embeddings", "layers.*.attention_norm", "layers.*.attention", "layers.*.ffn_norm"]
    modules += ["layers.*.feed_forward.router", "norm", "output"]
    if shape.shared:
        modules.append("layers.*.feed_forward.shared")
    rules = [Rule(pattern, whole) for pattern in modules]
    rules += [Rule(f"layers.{index}.feed_forward", whole) for index in range(shape.dense_layers)]
    return Plan("experts over ep", (*rules, Rule("layers.*.feed_forward.experts", Style(StyleName.EXPERTS))))
