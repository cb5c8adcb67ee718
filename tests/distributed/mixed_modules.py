"""Models of a user's own that mix what own_modules.py has one by one, with rotary tables, masks and positions
as real models make them; MIXES names each. Each function is one model."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.own_modules import (
    HEAD,
    HIDDEN,
    INNER,
    LENGTH,
    VOCAB,
    Activation,
    Adapted,
    Conv1D,
    GatedNorm,
    Mlp,
    RmsNorm,
    attended,
)

HEADS = 8
KV_HEADS = 4
Tables = tuple[Tensor, Tensor]


def rotary_tables(positions: Tensor, size: int) -> Tables:
    """positions [S] -> cos and sin [S, 1, size]."""
    speeds = 1.0 / 100.0 ** (torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions[:, None, None] * torch.cat((speeds, speeds))
    return angles.cos(), angles.sin()


def rotated(x: Tensor, tables: Tables) -> Tensor:
    """[B, S, heads, D], by halves."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def causal(x: Tensor) -> Tensor:
    """A mask to add [S, S], as long as x [B, S, ...] is."""
    length = x.shape[1]
    hidden = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype)
    return torch.triu(hidden, diagonal=1)


class Gated(nn.Module):
    def __init__(self, inner: int = INNER, kind: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.gate, self.up, self.down = kind(HIDDEN, inner), kind(HIDDEN, inner), kind(inner, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class AdaptedAttention(nn.Module):
    """Query, key and value in one weight with an adapter beside it, cut apart by sizes, and norms of queries
    and keys, each head by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
        self.groups = HEADS // KV_HEADS
        self.qkv, self.o = Adapted(HIDDEN, sum(self.sizes)), Adapted(HEADS * HEAD, HIDDEN)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in self.qkv(x).split(self.sizes, -1))
        q, k = rotated(self.q_norm(q), tables), rotated(self.k_norm(k), tables)
        k, v = (each.repeat_interleave(self.groups, 2) for each in (k, v))
        return self.o(attended(q, k, v))  # type: ignore[no-any-return]


class CappedAttention(nn.Module):
    """Scores are made one by one, soft-capped and masked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = HEADS, KV_HEADS
        self.q, self.o = (
            nn.Linear(HIDDEN, HEADS * HEAD, bias=False),
            nn.Linear(HEADS * HEAD, HIDDEN, bias=False),
        )
        self.k, self.v = (nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False) for _ in range(2))

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = rotated(self.q(x).view(batch, length, self.num_heads, HEAD), tables).transpose(1, 2)
        k = rotated(self.k(x).view(batch, length, self.num_kv_heads, HEAD), tables).transpose(1, 2)
        v = self.v(x).view(batch, length, self.num_kv_heads, HEAD).transpose(1, 2)
        groups = self.num_heads // self.num_kv_heads
        k, v = (
            each[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, self.num_heads, length, HEAD)
            for each in (k, v)
        )
        scores = torch.tanh(q @ k.transpose(2, 3) * HEAD**-0.5 / 5.0) * 5.0 + mask
        y = scores.softmax(-1, dtype=torch.float64).to(x.dtype) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class Gpt2Attention(nn.Module):
    """One Conv1D for queries, keys and values of equal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = HIDDEN, HIDDEN // HEAD
        self.c_attn, self.c_proj = Conv1D(HIDDEN, 3 * HIDDEN), Conv1D(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        q, k, v = (
            each.view(*x.shape[:-1], -1, HEAD).transpose(1, 2)
            for each in self.c_attn(x).split(self.embed_dim, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.c_proj(y.reshape(*x.shape[:-1], -1))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Weights of all experts in two tensors; each token goes through the best two, told by their weights."""

    def __init__(self, count: int = 4, inner: int = 8) -> None:
        super().__init__()
        self.count = count
        self.gate_up = nn.Parameter(torch.zeros(count, HIDDEN, 2 * inner))
        self.down = nn.Parameter(torch.zeros(count, inner, HIDDEN))

    def forward(self, x_TH: Tensor, weights_TE: Tensor) -> Tensor:
        tokens = x_TH.expand(self.count, -1, -1)
        gate, up = torch.bmm(tokens, self.gate_up).chunk(2, -1)
        made = torch.bmm(up * F.silu(gate), self.down)
        return (made * weights_TE.t().unsqueeze(-1)).sum(0)


class Router(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, HIDDEN))

    def forward(self, x_TH: Tensor) -> Tensor:
        scores = F.linear(x_TH, self.weight).softmax(-1)
        best, which = scores.topk(2, -1)
        return torch.zeros_like(scores).scatter(-1, which, best / best.sum(-1, keepdim=True))


class Mixture(nn.Module):
    """A router, experts, and an expert that all tokens share, by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts()
        self.shared, self.shared_gate = Gated(), nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.experts(tokens, self.router(tokens))
        shared = self.shared(tokens) * torch.sigmoid(self.shared_gate(tokens))
        return (routed + shared).reshape(x.shape)  # type: ignore[no-any-return]


class StateSpace(nn.Module):
    """As Mamba-2: one projection for gate, value, B, C and steps; a convolution; a decay per head; a norm
    that takes the gate."""

    def __init__(self, state: int = 3) -> None:
        super().__init__()
        self.num_heads, self.inner, self.state = HEADS, HEADS * HEAD, state
        self.conv_dim = self.inner + 2 * state
        self.in_proj = nn.Linear(HIDDEN, self.inner + self.conv_dim + HEADS, bias=False)
        self.conv = nn.Conv1d(self.conv_dim, self.conv_dim, 3, groups=self.conv_dim, padding=2)
        self.A_log, self.D = nn.Parameter(torch.zeros(HEADS)), nn.Parameter(torch.ones(HEADS))
        self.dt_bias = nn.Parameter(torch.zeros(HEADS))
        self.norm = GatedNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, HIDDEN, bias=False)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        gate, mixed, steps = self.in_proj(x).split((self.inner, self.conv_dim, self.num_heads), -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        value, b, c = mixed.split((self.inner, self.state, self.state), -1)
        value = value.view(*x.shape[:-1], self.num_heads, HEAD)
        step = F.softplus(steps + self.dt_bias)
        decay = (-step * torch.exp(self.A_log)).cumsum(1)
        weights = torch.exp(decay[:, :, None] - decay[:, None] + mask[None, :, :, None])
        pairs = (c @ b.transpose(1, 2))[..., None] * weights * step[:, None]
        y = torch.einsum("bstn,btnd->bsnd", pairs, value) + self.D[:, None] * value
        return self.out_proj(self.norm(y.flatten(2), gate))  # type: ignore[no-any-return]


class SharedKey(nn.Module):
    """One head of keys and values for all queries, in one weight with them; a quarter of each head turns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, 2 * HEAD
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2) * self.head_dim)
        self.o = nn.Linear(HEADS * self.head_dim, HIDDEN)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((self.num_heads * self.head_dim, self.head_dim, self.head_dim), -1)
        q, k, v = (each.view(*x.shape[:-1], -1, self.head_dim) for each in (q, k, v))
        q, k = (torch.cat((rotated(each[..., :HEAD], tables), each[..., HEAD:]), -1) for each in (q, k))
        k, v = (each.expand(-1, -1, self.num_heads, -1) for each in (k, v))
        return self.o(attended(q, k, v))  # type: ignore[no-any-return]


class NormedAttention(nn.Module):
    """Norms of queries and of keys over all heads at once; fewer heads of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = HEADS // KV_HEADS
        self.q, self.o = (
            nn.Linear(HIDDEN, HEADS * HEAD, bias=False),
            nn.Linear(HEADS * HEAD, HIDDEN, bias=False),
        )
        self.k, self.v = (nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = RmsNorm(HEADS * HEAD), RmsNorm(KV_HEADS * HEAD)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, HEAD)
        q = rotated(self.q_norm(self.q(x)).view(shape), tables)
        k = rotated(self.k_norm(self.k(x)).view(shape), tables).repeat_interleave(self.groups, 2)
        return self.o(attended(q, k, self.v(x).view(shape).repeat_interleave(self.groups, 2)))  # type: ignore[no-any-return]


class SunkAttention(nn.Module):
    """A learned score per head that takes a share and gives nothing, and a norm of all heads with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate = (nn.Linear(HIDDEN, HEADS * HEAD) for _ in range(4))
        self.o, self.norm = nn.Linear(HEADS * HEAD, HIDDEN), GatedNorm(HEADS * HEAD)
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) * HEAD**-0.5 + mask
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        shares = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        y = (shares @ v).transpose(1, 2).flatten(2)
        return self.o(self.norm(y, self.gate(x)))  # type: ignore[no-any-return]


class NamedGated(nn.Module):
    """Gate and up in one weight that is read by name; an activation that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.act = nn.Linear(HIDDEN, 2 * INNER), Activation()
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up.weight, self.gate_up.bias).chunk(2, -1)
        return self.down(self.act(gate) * up)  # type: ignore[no-any-return]


class LatentAttention(nn.Module):
    """Queries, keys and values through low ranks; a key that turns is for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.plain, self.rank = HEADS, 6, 10
        self.q_a, self.q_b = nn.Linear(HIDDEN, 12), nn.Linear(12, HEADS * (self.plain + HEAD), bias=False)
        self.kv_a = nn.Linear(HIDDEN, self.rank + HEAD, bias=False)
        self.kv_b = nn.Linear(self.rank, HEADS * (self.plain + HEAD), bias=False)
        self.q_norm, self.kv_norm = nn.RMSNorm(12), RmsNorm(self.rank)
        self.o = nn.Linear(HEADS * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_heads, self.plain + HEAD)
        q, q_turned = self.q_b(self.q_norm(self.q_a(x))).view(shape).split((self.plain, HEAD), -1)
        low, k_turned = self.kv_a(x).split((self.rank, HEAD), -1)
        k, v = self.kv_b(self.kv_norm(low)).view(shape).split((self.plain, HEAD), -1)
        k_turned = rotated(k_turned[:, :, None], tables).expand(*shape[:-1], -1)
        q, k = torch.cat((q, rotated(q_turned, tables)), -1), torch.cat((k, k_turned), -1)
        return self.o(attended(q, k, v))  # type: ignore[no-any-return]


class SlopedAttention(nn.Module):
    """A slope per head, from a buffer, lowers scores with distance."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, HIDDEN)
        self.register_buffer("slopes", torch.linspace(0.1, 0.8, HEADS))

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        parts = self.qkv(x).view(*x.shape[:-1], 3, self.num_heads, HEAD).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        positions = torch.arange(x.shape[1], device=x.device)
        distance = (positions[None, :] - positions[:, None]).to(x.dtype)
        bias = self.slopes[:, None, None] * distance + mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Norms before, after or both; or one norm, and both branches beside each other."""

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        *,
        places: str = "before",
        has_scales: bool = False,
    ) -> None:
        super().__init__()
        self.places, self.has_scales = places, has_scales
        self.mixer, self.mlp = mixer, mlp
        for place in ("before", "after"):
            if place in places:
                setattr(self, f"norm_{place}", norm(HIDDEN))
                setattr(self, f"mlp_norm_{place}", norm(HIDDEN))
        if places == "beside":
            self.norm = norm(HIDDEN)
        if has_scales:
            self.mixer_scale = nn.Parameter(torch.ones(HIDDEN))
            self.mlp_scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor, tables: Tables, mask: Tensor) -> Tensor:
        if self.places == "beside":
            normed = self.norm(x)
            return x + self.mixer(normed, tables, mask) + self.mlp(normed)  # type: ignore[no-any-return]
        y = self.mixer(self._normed("norm_before", x), tables, mask)
        y = self._normed("norm_after", y)
        x = x + (y * self.mixer_scale if self.has_scales else y)
        y = self._normed("mlp_norm_after", self.mlp(self._normed("mlp_norm_before", x)))
        return x + (y * self.mlp_scale if self.has_scales else y)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm = getattr(self, name, None)
        return x if norm is None else norm(x)


class Model(nn.Module):
    """ids [B, S] -> logits [B, S, V]. scale: of what is looked up; cap: of the logits."""

    def __init__(
        self,
        layers: list[Layer],
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        *,
        scale: float = 1.0,
        cap: float = 0.0,
        tied: bool = False,
        has_positions: bool = False,
        has_head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.cap = scale, cap
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Parameter(torch.zeros(LENGTH, HIDDEN)) if has_positions else None
        self.layers = nn.ModuleList(layers)
        self.norm = norm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=has_head_bias)
        if tied:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.3)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.embed(ids_BS) * self.scale
        positions = torch.arange(x.shape[1], device=x.device)
        if self.positions is not None:
            x = x + self.positions[positions]
        tables, mask = rotary_tables(positions, HEAD), causal(x)
        for layer in self.layers:
            x = layer(x, tables, mask)
        logits: Tensor = self.head(self.norm(x))
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def adapted() -> nn.Module:
    return Model([Layer(AdaptedAttention(), Gated(kind=Adapted)) for _ in range(2)])


def capped() -> nn.Module:
    def norm(size: int) -> nn.Module:
        return RmsNorm(size, 1.0)

    layers = [Layer(CappedAttention(), Gated(), norm, places="before and after") for _ in range(2)]
    return Model(layers, norm, scale=math.sqrt(HIDDEN), cap=30.0, tied=True)


def gpt2() -> nn.Module:
    layers = [Layer(Gpt2Attention(), Mlp(Conv1D), nn.LayerNorm) for _ in range(2)]
    return Model(layers, nn.LayerNorm, tied=True, has_positions=True)


def mixture() -> nn.Module:
    return Model([Layer(AdaptedAttention(), Mixture()) for _ in range(2)])


def alternating() -> nn.Module:
    return Model([Layer((StateSpace, NormedAttention)[at % 2](), Gated()) for at in range(4)])


def beside() -> nn.Module:
    layers = [Layer(SharedKey(), Mlp(), nn.LayerNorm, places="beside") for _ in range(2)]
    return Model(layers, nn.LayerNorm, has_head_bias=True)


def after() -> nn.Module:
    return Model([Layer(NormedAttention(), Gated(), RmsNorm, places="after") for _ in range(2)], RmsNorm)


def named() -> nn.Module:
    return Model([Layer(SunkAttention(), NamedGated()) for _ in range(2)])


def latent() -> nn.Module:
    return Model([Layer(LatentAttention(), Gated()) for _ in range(2)])


def scaled() -> nn.Module:
    layers = [Layer(SlopedAttention(), Gated(inner), has_scales=True) for inner in (32, 48, 32, 48)]
    return Model(layers, scale=2.0)


MIXES = {
    "adapted": "query, key and value in one weight, norms of each head, adapters on all of them",
    "capped": "a scaled and tied table, capped scores and logits, norms of 1 + weight before and after",
    "gpt2": "Conv1D in pieces, positions as a parameter, biases, a tied head",
    "mixture": "experts in 3-D weights, a router, an expert that is shared by a gate, adapters on attention",
    "alternating": "state space layers and attention in turn",
    "beside": "attention and MLP after one norm, one key head in the weight of all, a head with a bias",
    "after": "norms after only, and over all heads",
    "named": "gate and up in one weight that is read by name, a learned activation, sinks, a gated norm",
    "latent": "queries, keys and values through low ranks, with a key that all heads share",
    "scaled": "layers of two sizes, scales of residuals, slopes from a buffer, heads in a dim of three",
}
