"""For each module of own_modules.py a right plan, and one with a fault that the engine takes and only a proof
can see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwise.core.plan import Plan, Rule, Style
from tests.distributed.own_modules import (
    Activation,
    Adapted,
    Affine,
    Attention,
    ByName,
    Chunked,
    Conv1D,
    Decay,
    FewFused,
    FusedAttention,
    FusedConv,
    GroupedAttention,
    HeadsByGroup,
    Mlp,
    Model,
    Normed,
    NormedGroups,
    RmsNorm,
    Scaled,
    Scan,
    Selective,
    Sloped,
)

Rules = dict[str, Any]
OVER_ALL = {"style": "whole", "input": "shard(-1)", "output": "shard(-1)"}
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


def scan(conv: str) -> Rules:
    return {
        "blocks.*.mixer": {
            "style": "gather_input",
            "divide": ["inner", f"conv_dim: {conv}"],
            "parameters": {"scales": f"shard(0: 16+{conv})"},
        },
        "blocks.*.mixer.norm": OVER_ALL,
        "blocks.*.mixer.in_proj": {"style": "colwise", "pieces": f"16+{conv}"},
        "blocks.*.mixer.conv": {
            "style": "local",
            "parameters": {"weight": f"shard(0: {conv})", "bias": f"shard(0: {conv})"},
            "divide": [f"groups: {conv}"],
        },
        "blocks.*.mixer.out_proj": ROWWISE_1,
    }


def grouped(key: Any) -> Rules:
    return {
        "blocks.*.mixer": "gather_input",
        "blocks.*.mixer.q": "colwise",
        "blocks.*.mixer.k": key,
        "blocks.*.mixer.v": key,
        "blocks.*.mixer.o": ROWWISE_1,
    }


def few(pieces: str) -> Rules:
    return {
        "blocks.*.mixer": {"style": "gather_input", "divide": ["heads", "kv_heads: 2/2"]},
        "blocks.*.mixer.qkv": {"style": "colwise", "pieces": pieces},
        "blocks.*.mixer.o": ROWWISE_1,
    }


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


def selective(gradient: dict[str, str]) -> Rules:
    return {
        "blocks.*.mixer": "gather_input",
        "blocks.*.mixer.in_proj": "colwise",
        "blocks.*.mixer.select": {"style": "rowwise", "output": "replicate"} | gradient,
        "blocks.*.mixer.step": "colwise",
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


def by_group(pieces: str) -> Rules:
    return {
        "blocks.*.mixer": {"style": "gather_input", "divide": [f"sizes[{at}]" for at in range(3)]},
        "blocks.*.mixer.qkv": {"style": "colwise", "pieces": "16+16+16+16+16+16"},
        "blocks.*.mixer.o": ROWWISE_1 | {"pieces": pieces},
    }


def normed_groups(pieces: str | None) -> Rules:
    return {
        "blocks.*.mixer": "gather_input",
        "blocks.*.mixer.q": {"style": "colwise", "pieces": "16+16+16"},
        **dict.fromkeys(("blocks.*.mixer.k", "blocks.*.mixer.v"), PARTIAL),
        "blocks.*.mixer.q_norm": OVER_ALL | ({"pieces": pieces} if pieces else {}),
        "blocks.*.mixer.o": ROWWISE_1 | {"pieces": "16+16+16"},
    }


def sloped(bias: str) -> Rules:
    return {
        "blocks.*.mixer": {"style": "gather_input", "divide": ["num_heads"], "cut": {"bias": bias}},
        "blocks.*.mixer.qkv": "colwise",
        "blocks.*.mixer.o": ROWWISE_1,
    }


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
        "fewer key and value heads than ranks",
        lambda: Model(GroupedAttention),
        BASE | MLP | grouped({"style": "colwise", "pieces": "8/2"}),
        grouped(PARTIAL),
    ),
    Case(
        "query, key and value in one weight, fewer key and value heads than ranks",
        lambda: Model(FewFused),
        BASE | MLP | few("32+8/2+8/2"),
        few("8/2+8/2+32"),
    ),
    Case(
        "one weight, of which each rank has a part of some pieces and all of others",
        lambda: Model(Scan),
        BASE | MLP | scan("16+4/1+4/1"),
        {"blocks.*.mixer.in_proj": {"style": "colwise", "pieces": "32+4/1+4/1"}},
    ),
    Case(
        "a sum over channels that goes on into them",
        lambda: Model(Selective),
        BASE | MLP | selective({"gradient": "partial"}),
        selective({}),
        ("weight", "bias"),  # of it, and of all that stands before
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
    Case(
        "heads in groups of which every rank has all",
        lambda: Model(HeadsByGroup),
        BASE | MLP | by_group("16+16"),
        by_group("8+8+16"),
    ),
    Case(
        "a norm over all queries, of which each rank has some of each group",
        lambda: Model(NormedGroups),
        BASE | MLP | normed_groups("16+16+16"),
        normed_groups(None),
    ),
    Case(
        "slopes of heads, which the model gives to its attention",
        Sloped,
        BASE | MLP | sloped("shard(0) of every 4"),
        # heads of the first sequences alone
        sloped("shard(0)"),
    ),
    Case(
        "a table that norms its rows",
        lambda: Model(table=Normed),
        PLAIN | {"embed": ROWWISE_1, "embed.norm": PARTIAL},
        {"embed.norm": "replicate"},
        ("embed.norm.weight",),
    ),
)
BY_CASE = {case.name: case for case in CASES}
# `make test` proves hand-written plans of these, and plans that are made for the others
TELLING = frozenset(case.name for case in CASES[::2])
# and finds the faults of these
TELLING_FAULTS = frozenset(case.name for case in CASES[::4])

# a command names a model by its factory
globals().update({f"case_{index}": case.model for index, case in enumerate(CASES)})
