"""Modules of a user's own, one for each ingredient that other models have beside plain layers: small models
around them, a right plan for each, and one with a fault that only a proof can see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.plan import Plan, Rule, Style

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


Rules = dict[str, Any]
ROWWISE_1 = {"style": "rowwise", "output": "shard(1)"}
PARTIAL = {"style": "replicate", "gradient": "partial"}
BASE: Rules = {
    "embed": "rowwise",
    "**.norm": "sequence_parallel",
    "blocks.*.mlp_norm": "sequence_parallel",
    "head": {"style": "colwise", "input": "shard(1)"},
}
HEADS_CUT: Rules = {
    "blocks.*.mixer": {"style": "gather_input", "divide": ["num_heads"]},
    **{f"blocks.*.mixer.{name}": "colwise" for name in "qkv"},
    "blocks.*.mixer.o": ROWWISE_1,
}
MLP: Rules = {"blocks.*.mlp": "gather_input", "blocks.*.mlp.up": "colwise", "blocks.*.mlp.down": ROWWISE_1}
PLAIN = BASE | HEADS_CUT | MLP


@dataclass(frozen=True, slots=True)
class Case:
    """fault: rules in place of right ones, which the engine takes and a proof must find; found_in: how the
    names of parameters end of which it must say so, or none where the output tells."""

    name: str
    model: Callable[[], nn.Module]
    rules: Rules
    fault: Rules
    found_in: tuple[str, ...] = ()

    def plan(self, *, with_fault: bool = False) -> Plan:
        values = self.rules | (self.fault if with_fault else {})
        rules = tuple(Rule(pattern, Style.from_value(value)) for pattern, value in values.items() if value)
        return Plan(f"{self.name}, with a fault" if with_fault else self.name, rules)


def fused(pieces: str | None) -> Rules:
    held = {"style": "colwise", "pieces": pieces} if pieces else "colwise"
    return {
        "blocks.*.mixer": {"style": "gather_input", "divide": ["q_size", "kv_size"]},
        "blocks.*.mixer.qkv": held,
        "blocks.*.mixer.o": ROWWISE_1,
    }


def conv(up: str, down: str, bias: str = "replicate", up_bias: str = "shard(0)") -> Rules:
    return {
        "blocks.*.mlp": "gather_input",
        "blocks.*.mlp.up": {
            "style": "colwise",
            "parameters": {"weight": up, "bias": up_bias},
            "divide": ["nf"],
        },
        "blocks.*.mlp.down": ROWWISE_1 | {"parameters": {"weight": down, "bias": bias}},
    }


def affine(bias: str) -> Rules:
    return {
        "blocks.*.mlp.up": {"style": "colwise", "parameters": {"weight": "shard(0)", "bias": "shard(0)"}},
        "blocks.*.mlp.down": ROWWISE_1 | {"parameters": {"weight": "shard(1)", "bias": bias}},
    }


def activation(slope: str) -> Rules:
    return {"blocks.*.mlp.act": {"style": "local", "parameters": {"gain": "shard(0)", "slope": slope}}}


def decay(**parameters: str) -> Rules:
    return {
        "blocks.*.mixer": {
            "style": "gather_input",
            "divide": ["num_heads"],
            "parameters": {
                "A_log": "shard(0)",
                "dt_bias": "shard(0)",
                "temperature": "replicate, gradient partial",
            }
            | parameters,
        },
        "blocks.*.mixer.in_proj": "colwise",
        "blocks.*.mixer.dt_proj": "colwise",
        "blocks.*.mixer.out_proj": ROWWISE_1,
    }


LORA: Rules = {
    "blocks.*.mlp": "gather_input",
    "blocks.*.mlp.up.base": "colwise",
    "blocks.*.mlp.up.lora_a": PARTIAL,
    "blocks.*.mlp.up.lora_b": "colwise",
    "blocks.*.mlp.down.base": ROWWISE_1,
    "blocks.*.mlp.down.lora_a": ROWWISE_1,
    "blocks.*.mlp.down.lora_b": "sequence_parallel",
}
BY_NAME = {
    "up.weight": "shard(0)",
    "up.bias": "shard(0)",
    "down.weight": "shard(1)",
    "down.bias": "replicate",
}
WHOLE_TABLE: Rules = {"embed": {"style": "rowwise", "output": "replicate"}, "blocks.0": "split_input"}
OVER_ALL = {"style": "whole", "input": "shard(-1)", "output": "shard(-1)"}
Q_NORMS = ("mixer.q_norm.weight", "mixer.k_norm.weight")

CASES = (
    Case(
        "a norm of one's own", lambda: Model(norm=RmsNorm), PLAIN, {"**.norm": "replicate"}, ("norm.weight",)
    ),
    Case(
        "a norm with 1 + weight, of a plan without sequence parallelism",
        lambda: Model(norm=lambda size: RmsNorm(size, 1.0)),
        {
            "embed": {"style": "rowwise", "output": "replicate"},
            "**.norm": "replicate",
            "blocks.*.mlp_norm": "replicate",
            "blocks.*.mixer": {"style": "gather_input", "from": "replicate", "divide": ["num_heads"]},
            **{f"blocks.*.mixer.{name}": "colwise" for name in "qkv"},
            "blocks.*.mixer.o": "rowwise",
            "blocks.*.mlp.up": "colwise",
            "blocks.*.mlp.down": "rowwise",
            "head": "colwise",
        },
        {"**.norm": "sequence_parallel"},
        ("norm.weight",),
    ),
    Case(
        "norms of queries and keys, head by head",
        lambda: Model(lambda: Attention(RmsNorm)),
        PLAIN | {"blocks.*.mixer.q_norm": PARTIAL, "blocks.*.mixer.k_norm": PARTIAL},
        {
            "blocks.*.norm": {"style": "whole", "output": "replicate"},
            "blocks.*.mixer": {"style": "local", "divide": ["num_heads"]},
            **{f"blocks.*.mixer.{name}_norm": "replicate" for name in "qk"},
        },
        Q_NORMS,
    ),
    Case(
        "norms of queries and keys, all heads at once",
        lambda: Model(lambda: Attention(RmsNorm, over_all=True)),
        PLAIN | {"blocks.*.mixer.q_norm": OVER_ALL, "blocks.*.mixer.k_norm": OVER_ALL},
        {
            f"blocks.*.mixer.{name}_norm": {"style": "local", "parameters": {"weight": "shard(0)"}}
            for name in "qk"
        },
    ),
    Case(
        "a bias that is added once",
        lambda: Model(mlp=lambda: Mlp(Affine)),
        PLAIN | affine("replicate"),
        affine("replicate, gradient partial"),
    ),
    Case(
        "an activation with learned gain and slope",
        lambda: Model(mlp=lambda: Mlp(act=Activation())),
        PLAIN | activation("replicate, gradient partial"),
        {"blocks.*.mlp": {"style": "local"}, "blocks.*.mlp.up": {"style": "colwise", "input": "shard(1)"}}
        | activation("replicate"),
        ("act.slope",),
    ),
    Case(
        "query, key and value in one weight, by sizes",
        lambda: Model(FusedAttention),
        BASE | MLP | fused("32+16+16"),
        fused(None),
    ),
    Case(
        "gate and up in one weight, by chunk",
        lambda: Model(mlp=Chunked),
        BASE
        | HEADS_CUT
        | {
            "blocks.*.mlp": "gather_input",
            "blocks.*.mlp.gate_up": {"style": "colwise", "pieces": "32+32"},
            "blocks.*.mlp.down": ROWWISE_1,
        },
        {"blocks.*.mlp.gate_up": "colwise"},
    ),
    Case(
        "Conv1D",
        lambda: Model(mlp=lambda: Mlp(Conv1D)),
        BASE | HEADS_CUT | conv("shard(1)", "shard(0)"),
        conv("shard(1)", "shard(0)", "replicate, gradient partial"),
    ),
    Case(
        "Conv1D in pieces",
        lambda: Model(mlp=FusedConv),
        BASE | HEADS_CUT | conv("shard(1: 32+32)", "shard(0)", up_bias="shard(0: 32+32)"),
        conv("shard(1)", "shard(0)"),
    ),
    Case(
        "a table that scales",
        lambda: Model(table=Scaled),
        PLAIN | {"embed": ROWWISE_1},
        {"embed": {"style": "replicated"}, "**.norm": "replicate"},
        ("norm.weight",),
    ),
    Case(
        "a table that scales, cut by columns",
        lambda: Model(table=Scaled),
        PLAIN | {"embed": {"style": "colwise", "output": "shard(1)"}},
        {
            "embed": {"style": "colwise", "output": "replicate"},
            "blocks.0": "split_input",
            "norm": "replicate",
        },
        ("norm.weight",),
    ),
    Case(
        "adapters",
        lambda: Model(mlp=lambda: Mlp(Adapted)),
        BASE | HEADS_CUT | LORA,
        {
            "blocks.*.mlp": {"style": "local"},
            "blocks.*.mlp.up.base": {"style": "colwise", "input": "shard(1)"},
            "blocks.*.mlp.up.lora_a": "replicate",
            "blocks.*.mlp.up.lora_b": {"style": "colwise", "input": "shard(1)"},
        },
        ("up.lora_a.weight",),
    ),
    Case(
        "positions as a parameter of the model",
        lambda: Model(has_positions=True),
        PLAIN | WHOLE_TABLE | {".": "replicate"},
        {".": PARTIAL},
        ("positions",),
    ),
    Case(
        "parameters of a module that holds others",
        lambda: Model(Decay),
        BASE | MLP | decay(),
        {
            "blocks.*.norm": {"style": "whole", "output": "replicate"},
            **{
                key: rule | {"style": "local"}
                for key, rule in decay(temperature="replicate").items()
                if key == "blocks.*.mixer"
            },
        },
        ("mixer.temperature",),
    ),
    Case(
        "parameters that are read by name",
        lambda: Model(mlp=ByName),
        BASE
        | HEADS_CUT
        | {"blocks.*.mlp": {"style": "gather_input", "output": "shard(1)", "parameters": BY_NAME}},
        {
            "blocks.*.mlp": {
                "style": "gather_input",
                "output": "shard(1)",
                "parameters": BY_NAME | {"down.bias": "replicate, gradient partial"},
            }
        },
    ),
    Case(
        "a head of one's own, tied",
        lambda: Model(tied=True),
        PLAIN | {"head": {"style": "colwise", "input": "shard(1)", "parameters": {"weight": "shard(0)"}}},
        {"norm": "replicate"},
        ("norm.weight",),
    ),
    Case(
        "a module that is left whole",
        lambda: Model(mlp=Chunked),
        BASE | HEADS_CUT | {"blocks.*.mlp": "whole"},
        {"blocks.*.mlp": None, "blocks.*.mlp.*": "replicate"},
        ("gate_up.weight", "gate_up.bias", "down.weight"),
    ),
)
BY_CASE = {case.name: case for case in CASES}

# a command names a model by its factory
globals().update({f"case_{index}": case.model for index, case in enumerate(CASES)})
