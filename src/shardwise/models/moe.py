"""Mixtures of experts: Llama's block with a router and experts in the feed-forward's place; q/k norms where a
model has them.

The router takes the `top_k` experts of the highest probability, and divides their probabilities by their sum.
Experts are called as transformers calls them: experts(hidden [N, H], top_k_index [N, K], top_k_weights [N,
K]). Their matmuls are grouped in bfloat16 (torch._grouped_mm), which is what CUDA has; in other dtypes, and
where rows aren't multiples of 16 bytes, a loop over the experts on the tokens sorted by expert. Both give the
same at every run.

capacity: an expert takes at most ceil(capacity x S x top_k / experts) assignments of one sequence, the first
ones; the others are dropped, and their tokens get nothing of it. So what is dropped doesn't depend on how a
batch is cut. (Groups of tokens with a capacity each: Lepikhin et al. 2020, GShard. There S is any group.)

Shape suffixes: B batch, S sequence, N tokens, K choices of a token, A assignments (N x K), H hidden, E
experts, F an expert's inner width, D head dim.

Sources: Shazeer et al. 2017 (top-k of a softmax), Jiang et al. 2024 (Mixtral), Yang et al. 2025 (Qwen3).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.errors import ModelError
from shardwise.models.balance import LoadBalance
from shardwise.models.llama import Attention, Block, Llama, LlamaConfig, SwiGLU
from shardwise.models.routing import counts_of, ends_of

# what torch._grouped_mm wants of a row's bytes
_ROW_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig(LlamaConfig):
    """Shapes of one model; `ffn_hidden` is an expert's inner width. head_width: of a head, where it isn't
    hidden / n_heads. capacity: 0 drops nothing. aux_loss: the coefficient of the loss that balances
    the load (balance.py)."""

    n_experts: int
    top_k: int
    head_width: int | None = None
    qk_norm: bool = False
    capacity: float = 0.0
    aux_loss: float = 0.0

    def __post_init__(self) -> None:
        LlamaConfig.__post_init__(self)
        if self.top_k > self.n_experts:
            raise ModelError(
                f"moe: a token goes to {self.top_k} of {self.n_experts} experts. Use top_k of at most "
                f"{self.n_experts}."
            )

    @property
    def head_dim(self) -> int:
        return self.head_width or self.hidden // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Exact count; a tied head counts once."""
        width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.hidden * (width + kv_width) + (2 * self.head_dim if self.qk_norm else 0)
        experts = self.n_experts * 3 * self.hidden * self.ffn_hidden
        layer = attention + experts + self.n_experts * self.hidden + 2 * self.hidden
        return (1 if self.tied else 2) * self.vocab_size * self.hidden + self.n_layers * layer + self.hidden


class NormedAttention(Attention):
    """Llama's, with a norm of each query and key head where the model has them."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def heads(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BSND, k_BSND, v_BSND = super().heads(hidden_BSH)
        return self.q_norm(q_BSND), self.k_norm(k_BSND), v_BSND


class Router(nn.Module):
    """hidden [B, S, H] -> (top_k_index [N, K], top_k_weights [N, K]). Probabilities are computed in float32
    at least."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.capacity = config.capacity
        self.needs_whole_sequences = config.capacity > 0
        self.gate = nn.Linear(config.hidden, config.n_experts, bias=False)
        self.balance = LoadBalance(config.aux_loss) if config.aux_loss else None

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        logits_BSE = self.gate(hidden_BSH)
        dtype = torch.promote_types(logits_BSE.dtype, torch.float32)
        probabilities_BSE = F.softmax(logits_BSE, dim=-1, dtype=dtype)
        top_BSK, index_BSK = probabilities_BSE.topk(self.top_k, dim=-1)
        weights_BSK = top_BSK / top_BSK.sum(-1, keepdim=True)
        if self.balance is not None:
            flat = (each.flatten(0, 1) for each in (weights_BSK, probabilities_BSE, index_BSK))
            weights_BSK = self.balance(*flat).view_as(weights_BSK)
        if self.capacity:
            most = math.ceil(self.capacity * index_BSK[0].numel() / logits_BSE.shape[-1])
            index_BSK, weights_BSK = _drop(index_BSK, weights_BSK, most, logits_BSE.shape[-1])
        return index_BSK.flatten(0, 1), weights_BSK.flatten(0, 1).to(hidden_BSH.dtype)


def _drop(index_BSK: Tensor, weights_BSK: Tensor, most: int, experts: int) -> tuple[Tensor, Tensor]:
    """Of each sequence, what is beyond `most` assignments of an expert goes to none: its index is `experts`,
    its weight 0."""
    chosen_BAE = F.one_hot(index_BSK.flatten(1), experts)
    place_BA = (chosen_BAE.cumsum(1) * chosen_BAE).sum(-1)
    is_kept_BSK = (place_BA <= most).view_as(index_BSK)
    return index_BSK.where(is_kept_BSK, experts), weights_BSK.where(is_kept_BSK, 0)


class Experts(nn.Module):
    """SwiGLU of each expert: w2(silu(w1 x) * w3 x), weighted and summed over a token's experts.

    An index of `num_experts` is no expert: the assignment is dropped. drops: whether there may be any.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_experts, config.hidden, config.ffn_hidden
        self.num_experts = experts
        self.drops = config.capacity > 0
        self.fused_swiglu = config.fused_swiglu
        self.w1 = nn.Parameter(torch.empty(experts, inner, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner))
        self.w3 = nn.Parameter(torch.empty(experts, inner, hidden))
        for weight_EOI in (self.w1, self.w2, self.w3):  # as nn.Linear begins
            bound = weight_EOI.shape[-1] ** -0.5
            nn.init.uniform_(weight_EOI, -bound, bound)

    def forward(self, hidden_NH: Tensor, top_k_index_NK: Tensor, top_k_weights_NK: Tensor) -> Tensor:
        top_k = top_k_index_NK.shape[1]
        expert_A, order_A = top_k_index_NK.flatten().sort(stable=True)
        rows_AH = hidden_NH[order_A // top_k]
        if self.drops:
            rows_AH = rows_AH[: sum(counts_of(expert_A, self.num_experts))]
        groups = _Groups(expert_A, self.num_experts)
        gate_AF = groups.matmul(rows_AH, self.w1)
        if self.fused_swiglu:
            inner_AF: Tensor = SwiGLU.apply(gate_AF, groups.matmul(rows_AH, self.w3))
        else:
            inner_AF = F.silu(gate_AF) * groups.matmul(rows_AH, self.w3)
        out_AH = groups.matmul(inner_AF, self.w2)
        if len(out_AH) < len(order_A):
            out_AH = torch.cat((out_AH, out_AH.new_zeros(len(order_A) - len(out_AH), out_AH.shape[1])))
        by_token_NKH: Tensor = out_AH[order_A.argsort()].unflatten(0, top_k_index_NK.shape)
        return (by_token_NKH * top_k_weights_NK.unsqueeze(-1)).sum(1)


class _Groups:
    """Rows sorted by expert, each to be multiplied by its expert's matrix."""

    def __init__(self, expert_A: Tensor, experts: int) -> None:
        self._expert_A, self._experts = expert_A, experts
        self._ends: Tensor | None = None
        self._counts: list[int] | None = None

    def matmul(self, rows_AI: Tensor, weight_EOI: Tensor) -> Tensor:
        """[A, I] times each expert's [O, I], turned -> [A, O]."""
        if _has_grouped(rows_AI, weight_EOI):
            if self._ends is None:
                self._ends = ends_of(self._expert_A, self._experts)
            out_AO: Tensor = F.grouped_mm(rows_AI, weight_EOI.transpose(1, 2), offs=self._ends)
            return out_AO
        if self._counts is None:
            self._counts = counts_of(self._expert_A, self._experts)
        each = zip(rows_AI.split(self._counts), weight_EOI.unbind(0), strict=True)
        return torch.cat([rows @ weight_OI.t() for rows, weight_OI in each])


def _has_grouped(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch._grouped_mm takes it, here and on CUDA."""
    return rows.dtype is torch.bfloat16 and all(
        size * rows.element_size() % _ROW_BYTES == 0 for size in weight.shape[1:]
    )


class MixtureOfExperts(nn.Module):
    """hidden [B, S, H] -> [B, S, H]: each token by the experts that the router chooses."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        index_NK, weights_NK = self.router(hidden_BSH)
        out_NH: Tensor = self.experts(hidden_BSH.flatten(0, 1), index_NK, weights_NK)
        return out_NH.view_as(hidden_BSH)


class MoE(Llama):
    """ids [B, S] -> logits [B, S, V]: Llama, with experts in each layer."""

    def block(self, config: Any) -> Block:
        return Block(config, NormedAttention(config), MixtureOfExperts(config))
