"""Modules of a user's own, one for each ingredient that other models have beside plain layers, and small
models around them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, INNER, HEADS, HEAD = 34, 16, 32, 4, 4
LENGTH = 64


class RmsNorm(nn.Module):
    """offset 1: the weight is what is added to 1."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size) - offset)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.offset + self.weight)


class FusedConv(nn.Module):
    """Gate and up in one weight [in, out], and what comes of them through another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(HIDDEN, 2 * INNER), Conv1D(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Affine(nn.Module):
    """A linear layer of another class, with a bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Conv1D(nn.Module):
    """As GPT-2's: [in, out], and it knows its own width."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.nf = n_out
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(size)


class Activation(nn.Module):
    """A learned gain per feature, and a learned slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(INNER))
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.slope * x) * self.gain


class Mlp(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module] = nn.Linear, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = kind(HIDDEN, INNER), kind(INNER, HIDDEN)
        self.act = act or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class Chunked(nn.Module):
    """Gate and up in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class ByName(nn.Module):
    """Reads the parameters of the modules inside, and calls none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(F.linear(x, self.up.weight, self.up.bias))
        return F.linear(inner, self.down.weight, self.down.bias)


class Attention(nn.Module):
    """kv_heads: as many, or fewer. norm: of queries and keys, each head by itself or all at once."""

    def __init__(self, norm: Callable[[int], nn.Module] | None = None, *, over_all: bool = False) -> None:
        super().__init__()
        self.num_heads, self.over_all = HEADS, over_all
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        size = HIDDEN if over_all else HEAD
        self.q_norm, self.k_norm = (norm(size) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        split = (*x.shape[:-1], self.num_heads, HEAD)
        if self.over_all:
            q, k = self.q_norm(self.q(x)).view(split), self.k_norm(self.k(x)).view(split)
        else:
            q, k = self.q_norm(self.q(x).view(split)), self.k_norm(self.k(x).view(split))
        return self.o(attended(q, k, self.v(x).view(split)))  # type: ignore[no-any-return]


class FusedAttention(nn.Module):
    """Queries of 8 heads, then keys, then values of 4, in one weight; cut apart by sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_size, self.kv_size = 8 * HEAD, 4 * HEAD
        self.qkv = nn.Linear(HIDDEN, self.q_size + 2 * self.kv_size)
        self.o = nn.Linear(self.q_size, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split((self.q_size, self.kv_size, self.kv_size), -1)
        q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in parts)
        return self.o(attended(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))  # type: ignore[no-any-return]


class FewFused(nn.Module):
    """8 heads of queries, then 2 of keys, then of values, in one weight; it counts each."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads = 8, 2
        self.qkv = nn.Linear(HIDDEN, (self.heads + 2 * self.kv_heads) * HEAD)
        self.o = nn.Linear(self.heads * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kv = self.kv_heads * HEAD
        q, k, v = self.qkv(x).split((self.heads * HEAD, kv, kv), -1)
        q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in (q, k, v))
        groups = self.heads // self.kv_heads
        return self.o(attended(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))  # type: ignore[no-any-return]


class GroupedAttention(nn.Module):
    """8 heads of queries, and 2 of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(HIDDEN, 8 * HEAD, bias=False), nn.Linear(8 * HEAD, HIDDEN, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, 2 * HEAD) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)) for layer in (self.q, self.k, self.v))
        groups = q.shape[2] // k.shape[2]
        y: Tensor = self.o(attended(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        return y


class HeadsByGroup(nn.Module):
    """Query, key and value of two groups of heads, one group after the other; it says 2, and no attribute
    does. sizes: of a group's queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (4 * HEAD, 4 * HEAD, 4 * HEAD)
        self.qkv, self.o = nn.Linear(HIDDEN, 2 * sum(self.sizes)), nn.Linear(8 * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (2, -1)).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, HEAD)).flatten(2, 3) for part in parts)
        return self.o(attended(q, k, v))  # type: ignore[no-any-return]


class NormedGroups(nn.Module):
    """3 heads of keys and values, 4 of queries for each, and a norm over all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(HIDDEN, 12 * HEAD, bias=False), nn.Linear(12 * HEAD, HIDDEN, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, 3 * HEAD, bias=False) for _ in range(2))
        self.q_norm = RmsNorm(12 * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_norm(self.q(x)).unflatten(-1, (3, -1, HEAD))
        k, v = (layer(x).unflatten(-1, (3, 1, HEAD)).expand_as(q) for layer in (self.k, self.v))
        return self.o(attended(*(each.flatten(2, 3) for each in (q, k, v))))  # type: ignore[no-any-return]


class SlopedAttention(nn.Module):
    """Takes what the model adds to the scores of all heads of all sequences, [B x heads, 1, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, self.num_heads, 3, HEAD).transpose(1, 2).unbind(3)
        added = bias.view(batch, self.num_heads, 1, length) + torch.full((length, length), -1e9).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(x.dtype))
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedNorm(RmsNorm):
    """Of all that it gets, times a gate."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * F.silu(gate))


class Scan(nn.Module):
    """As a state space layer whose B and C are for all heads, mixed along the sequence by a convolution; with
    constants per channel, and a norm of all heads that takes a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv_dim = HIDDEN, HIDDEN + 2 * HEAD
        self.in_proj = nn.Linear(HIDDEN, self.inner + self.conv_dim)
        self.conv = nn.Conv1d(self.conv_dim, self.conv_dim, 3, groups=self.conv_dim, padding=2)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm = GatedNorm(HIDDEN)
        self.register_buffer("scales", torch.linspace(0.5, 1.5, self.inner + self.conv_dim))

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed = (self.in_proj(x) * self.scales).split((self.inner, self.conv_dim), -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        value, b, c = mixed.split((self.inner, HEAD, HEAD), -1)
        y = self.norm(value * (b * c).sum(-1, keepdim=True), gate)
        return self.out_proj(y)  # type: ignore[no-any-return]


class Selective(nn.Module):
    """As a state space layer whose steps, and what they let through, are made of its own channels."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.select = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2 * HEAD)
        self.step, self.out_proj = nn.Linear(HEAD, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value = F.silu(self.in_proj(x))
        low, through = self.select(value).split((HEAD, HEAD), -1)
        step = F.softplus(self.step(low))
        return self.out_proj(value * step * through.sum(-1, keepdim=True))  # type: ignore[no-any-return]


class Decay(nn.Module):
    """As a state space layer: parameters of its own per head, and two that are for all."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.A_log = nn.Parameter(torch.zeros(HEADS))
        self.dt_bias = nn.Parameter(torch.zeros(HEADS))
        self.temperature = nn.Parameter(torch.ones(1))
        self.in_proj, self.dt_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HEADS)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        step_BSN = F.softplus(self.dt_proj(x) + self.dt_bias) * self.temperature
        kept = torch.exp(-step_BSN * torch.exp(self.A_log)).unsqueeze(-1)
        value = self.in_proj(x).view(*x.shape[:-1], self.num_heads, HEAD) * kept
        return self.out_proj(value.cumsum(1).flatten(-2))  # type: ignore[no-any-return]


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out)
        self.base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(n_in, 4, bias=False), nn.Linear(4, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.lora_b(self.lora_a(x))  # type: ignore[no-any-return]


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


class Normed(nn.Embedding):
    """Its rows normed, inside it, as Inkling's."""

    def __init__(self, rows: int, width: int, padding_idx: int) -> None:
        super().__init__(rows, width, padding_idx)
        self.norm = nn.RMSNorm(width, eps=1e-3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))  # type: ignore[no-any-return]


class Matrix(nn.Module):
    """A head that isn't a linear layer's class."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight) if not isinstance(weight, nn.Parameter) else weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, heads, D] each -> [B, S, heads x D]."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = norm(HIDDEN), mixer
        self.mlp_norm, self.mlp = norm(HIDDEN), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class SlopedBlock(Block):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.mixer(self.norm(x), bias=bias)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """ids [B, S] -> logits [B, S, V]."""

    def __init__(
        self,
        mixer: Callable[[], nn.Module] = Attention,
        mlp: Callable[[], nn.Module] = Mlp,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        table: type[nn.Embedding] = nn.Embedding,
        *,
        has_positions: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = table(VOCAB, HIDDEN, padding_idx=3)
        if has_positions:
            self.positions = nn.Parameter(torch.zeros(1, LENGTH, HIDDEN))
        self.blocks = nn.ModuleList(Block(norm, mixer(), mlp()) for _ in range(2))
        self.norm = norm(HIDDEN)
        self.head = Matrix(self.embed.weight) if tied else nn.Linear(HIDDEN, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.3)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.embed(ids_BS)
        if hasattr(self, "positions"):
            x = x + self.positions[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Sloped(Model):
    """Adds to the scores of each head how far back a token is, times the head's slope: one table for all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SlopedBlock(nn.RMSNorm, SlopedAttention(), Mlp()) for _ in range(2))

    def forward(self, ids_BS: Tensor) -> Tensor:
        batch, length = ids_BS.shape
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        bias = (slopes[:, None] * torch.arange(length)).repeat(batch, 1).unsqueeze(1)
        x = self.embed(ids_BS)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def by_group() -> nn.Module:
    return Model(HeadsByGroup)


def normed_groups() -> nn.Module:
    return Model(NormedGroups)
