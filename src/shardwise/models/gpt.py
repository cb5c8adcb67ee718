"""The GPT family as Megatron trains it: learned positions, LayerNorm before each half, fused QKV, GELU,
biases, tied or untied head.

Where a module is what Llama has, it has Llama's name (tok_embeddings, layers.N.attention.wo, ..., norm,
output). Head counts are read off the projections' outputs, so a module whose projections hold some of the
heads computes just those. Nothing here knows of ranks. There is no dropout, which the published runs had: its
traffic isn't modelled.

Shape suffixes: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary, 3 query, key and value.

Sources: Radford et al. 2019 (GPT-2: the block, tanh GELU, tied head), Brown et al. 2020, table 2.1 (GPT-3:
shapes), Shoeybi et al. 2019 (Megatron-LM: QKV by head, so that a contiguous part holds whole heads).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.models.documents import causal_within


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Shapes of one model of the family; `ffn_hidden` is the MLP's inner width, `max_seq` the number of
    learned positions."""

    vocab_size: int
    hidden: int
    n_layers: int
    n_heads: int
    ffn_hidden: int
    max_seq: int
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.hidden % self.n_heads:
            raise ModelError(f"gpt: hidden {self.hidden} is no multiple of {self.n_heads} heads.")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Each head has keys and values of its own."""
        return self.n_heads

    @property
    def n_parameters(self) -> int:
        """Exact count; a tied head counts once."""
        attention = 4 * self.hidden**2 + 4 * self.hidden
        feed_forward = 2 * self.hidden * self.ffn_hidden + self.ffn_hidden + self.hidden
        layer = attention + feed_forward + 4 * self.hidden
        tables = ((1 if self.tied else 2) * self.vocab_size + self.max_seq) * self.hidden
        return tables + self.n_layers * layer + 2 * self.hidden


class Attention(nn.Module):
    """Causal attention; computes as many heads as its projections give. A mask says instead which keys a
    query sees. Rows of wqkv: by head, then query, key, value, then head dim."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.wo = nn.Linear(config.hidden, config.hidden)

    def forward(self, hidden_BSH: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        qkv_BSN3D = self.wqkv(hidden_BSH).unflatten(-1, (-1, 3, self.head_dim))
        q_BNSD, k_BNSD, v_BNSD = (each_BSND.transpose(1, 2) for each_BSND in qkv_BSN3D.unbind(3))
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BNSD, v_BNSD, attn_mask=mask_B1SS, is_causal=mask_B1SS is None
        )
        return self.wo(out_BNSD.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """w2(gelu(w1 x)), with the tanh approximation of GELU that GPT-2 and Megatron's fused kernel have."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden, config.ffn_hidden)
        self.w2 = nn.Linear(config.ffn_hidden, config.hidden)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(hidden_BSH), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_BSH: Tensor, mask_B1SS: Tensor | None = None) -> Tensor:
        hidden_BSH = hidden_BSH + self.attention(self.attention_norm(hidden_BSH), mask_B1SS)
        return hidden_BSH + self.feed_forward(self.ffn_norm(hidden_BSH))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """ids [B, S] -> logits [B, S, V]. position_ids [B or 1, S]: each token's place in its text, where that
    isn't its place in ids. documents [B, S]: the number of the document that a token belongs to, where a
    sequence has several; they don't see each other. Weights are uninitialised noise until somebody fills them
    (models/init.py)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden)
        self.pos_embeddings = nn.Embedding(config.max_seq, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.output = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self, ids_BS: Tensor, position_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        seq = ids_BS.shape[1]
        if position_ids is None and seq > self.config.max_seq:
            raise ModelError(
                f"gpt: a sequence of {seq}, and learned positions for {self.config.max_seq}. Use a shorter "
                f"one, or max_seq={seq}."
            )
        if position_ids is None:
            position_ids = torch.arange(seq, device=ids_BS.device).unsqueeze(0)
        hidden_BSH = self.tok_embeddings(ids_BS) + self.pos_embeddings(position_ids)
        mask_B1SS = None if documents is None else causal_within(documents.to(hidden_BSH.device))
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH, mask_B1SS)
        return self.output(self.norm(hidden_BSH))  # type: ignore[no-any-return]
