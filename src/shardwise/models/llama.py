"""The Llama 3 family as plain modules: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, tied or
untied head.

Module names are torchtitan's (tok_embeddings, layers.N.attention.wq, ..., norm, output). Head counts are read
off the projections' outputs, so a module whose projections hold some of the heads computes just those.
Nothing here knows of ranks.

Shape suffixes: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary.

Sources: Touvron et al. 2023 (Llama 2, the block), Dubey et al. 2024 (Llama 3: shapes, theta 500000), Su et
al. 2021 (RoPE).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.models.documents import causal_within


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies. Source: Meta's published params.json and model code
    of Llama 3.1."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq: int = 8192


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shapes of one model of the family; `ffn_hidden` is SwiGLU's inner width. fused_swiglu: keeps the two
    matmuls' outputs alone for its backward, and not silu's, as Megatron's and Transformer Engine's kernels
    do."""

    vocab_size: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_hidden: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    padding_idx: int | None = None
    fused_swiglu: bool = False

    def __post_init__(self) -> None:
        if self.hidden % self.n_heads:
            raise ModelError(f"llama: hidden {self.hidden} is no multiple of {self.n_heads} heads.")
        if self.head_dim % 2:
            raise ModelError(f"llama: head dim {self.head_dim} is odd; rotary embeddings need an even one.")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"llama: {self.n_heads} heads are no multiple of {self.n_kv_heads} KV heads.")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Exact count; a tied head counts once."""
        kv_width = self.n_kv_heads * self.head_dim
        layer = (
            2 * self.hidden**2
            + 2 * self.hidden * kv_width
            + 3 * self.hidden * self.ffn_hidden
            + 2 * self.hidden
        )
        return (1 if self.tied else 2) * self.vocab_size * self.hidden + self.n_layers * layer + self.hidden


def rotary_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angle per position of each pair of a head's dims: [D/2], float64, theta^(-2i/D), stretched where the
    config says so."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 for long waves (stretched by the factor), 1 for short ones (kept), a ramp between
    keep = ((scaling.original_max_seq / wavelength - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_table(config: LlamaConfig, positions: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of positions [S] or [B, S]: [2, S, D/2] or [2, B, S, D/2]."""
    angles_SD = positions.to(device, torch.float64)[..., None] * rotary_frequencies(config, device)
    return torch.stack((angles_SD.cos(), angles_SD.sin())).to(dtype)


def rotate(x_BSND: Tensor, rope_2SD: Tensor) -> Tensor:
    """Rotates the pair (i, i + D/2) of each head's dims by the position's angle: the layout of published
    Llama weights on Hugging Face."""
    cos_SD, sin_SD = rope_2SD[..., None, :].unbind(0)
    first, second = x_BSND.chunk(2, dim=-1)
    return torch.cat((first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention; computes as many heads as its projections give. A mask says instead
    which keys a query sees."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads))
        self.wq = nn.Linear(config.hidden, width, bias=False)
        self.wk = nn.Linear(config.hidden, kv_width, bias=False)
        self.wv = nn.Linear(config.hidden, kv_width, bias=False)
        self.wo = nn.Linear(width, config.hidden, bias=False)

    def heads(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, before they are rotated: [B, S, N, D] each."""
        q_BSND, k_BSND, v_BSND = (
            projection(hidden_BSH).unflatten(-1, (-1, self.head_dim))
            for projection in (self.wq, self.wk, self.wv)
        )
        return q_BSND, k_BSND, v_BSND

    def forward(self, hidden_BSH: Tensor, rope_2SD: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        q_BSND, k_BSND, v_BSND = self.heads(hidden_BSH)
        out_BNSD = F.scaled_dot_product_attention(
            rotate(q_BSND, rope_2SD).transpose(1, 2),
            rotate(k_BSND, rope_2SD).transpose(1, 2),
            v_BSND.transpose(1, 2),
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=q_BSND.shape[2] != k_BSND.shape[2],
        )
        return self.wo(out_BNSD.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, any equal shapes. silu is made again in the backward, so that it needn't be kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.hidden, bias=False)
        self.w3 = nn.Linear(config.hidden, config.ffn_hidden, bias=False)
        self.fused_swiglu = config.fused_swiglu

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        if self.fused_swiglu:
            inner_BSF = SwiGLU.apply(self.w1(hidden_BSH), self.w3(hidden_BSH))
            return self.w2(inner_BSF)  # type: ignore[no-any-return]
        return self.w2(F.silu(self.w1(hidden_BSH)) * self.w3(hidden_BSH))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, hidden_BSH: Tensor, rope_2SD: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        hidden_BSH = hidden_BSH + self.attention(self.attention_norm(hidden_BSH), rope_2SD, mask_B1SS)
        return hidden_BSH + self.feed_forward(self.ffn_norm(hidden_BSH))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """ids [B, S] -> logits [B, S, V]. position_ids [B or 1, S]: each token's place in its text, where that
    isn't its place in ids. documents [B, S]: the number of the document that a token belongs to, where a
    sequence has several; they don't see each other. Weights are uninitialised noise until somebody fills them
    (models/init.py)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden, padding_idx=config.padding_idx)
        self.layers = nn.ModuleList(self.block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.output = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def block(self, config: Any) -> Block:
        """A layer of it."""
        return Block(config, Attention(config), FeedForward(config))

    def forward(
        self, ids_BS: Tensor, position_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        hidden_BSH = self.tok_embeddings(ids_BS)
        device = hidden_BSH.device
        rope_2SD = rotary_table(
            self.config,
            torch.arange(ids_BS.shape[1], device=device, dtype=torch.float64)
            if position_ids is None
            else position_ids,
            device,
            hidden_BSH.dtype,
        )
        mask_B1SS = None if documents is None else causal_within(documents.to(device))
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH, rope_2SD, mask_B1SS)
        return self.output(self.norm(hidden_BSH))  # type: ignore[no-any-return]
