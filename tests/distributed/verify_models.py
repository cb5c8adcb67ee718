"""Models with plans that train the wrong model, or crash, each in the way of a fault that was found in a real
one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from shardwise.models.hugging_face import find_hugging_face
from shardwise.models.small import small_values


def _hugging_face(model_type: str, change: Callable[[dict[str, str]], None], **values: object) -> nn.Module:
    """A small model of a type whose own plan was changed. Keys are relative to the base model."""
    from transformers import AutoModelForCausalLM

    config = find_hugging_face(f"hf:{model_type}").config
    small = type(config).from_dict(small_values(config, 2) | values)
    plan = dict(small.base_model_tp_plan)
    change(plan)
    small.base_model_tp_plan = plan
    model: nn.Module = AutoModelForCausalLM.from_config(
        small, dtype=torch.get_default_dtype(), experts_implementation="eager"
    )
    return model


def qwen3_as_shipped() -> nn.Module:
    return _hugging_face("qwen3", lambda plan: None)


def qwen3_norms_not_summed() -> nn.Module:
    """Norms of queries and keys, after colwise projections: each rank has its heads' part of the gradient."""

    def change(plan: dict[str, str]) -> None:
        for name in ("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"):
            del plan[name]

    return _hugging_face("qwen3", change)


def llama_norm_sequence_parallel() -> nn.Module:
    """A norm that takes its input for a part of the sequence, which is whole."""
    return _hugging_face(
        "llama", lambda plan: plan.update({"layers.*.post_attention_layernorm": "sequence_parallel"})
    )


def mixtral_experts_cut_as_one() -> nn.Module:
    """Gate and up in one weight, cut as if they were one."""
    return _hugging_face(
        "mixtral", lambda plan: plan.update({"layers.*.mlp.experts.gate_up_proj": "colwise"})
    )


def llama_typo() -> nn.Module:
    return _hugging_face("llama", lambda plan: plan.update({"layers.*.mlp.gate_prj": "colwise"}))


def llama_one_kv_head() -> nn.Module:
    return _hugging_face("llama", lambda plan: None, num_key_value_heads=1)


class Block(nn.Module):
    """Two linear layers with a learnable activation and a norm, small enough to shard by hand."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.RMSNorm(16)
        self.up = nn.Linear(16, 32)
        self.slope = nn.Parameter(torch.ones(()))
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden = self.embed(ids_BS)
        inner = self.up(self.norm(hidden))
        slope = self.slope.to_local() if isinstance(self.slope, DTensor) else self.slope
        out: Tensor = self.head(hidden + self.down(torch.tanh(slope * inner)))
        return out


def _by_hand(model: Block, mesh: DeviceMesh, **styles: Any) -> Block:
    tp = mesh["tp"] if mesh.ndim > 1 else mesh
    parallelize_module(model, tp, {"up": ColwiseParallel(), "down": RowwiseParallel()} | styles)
    return model


def by_hand_right(mesh: DeviceMesh | None = None) -> nn.Module:
    """The slope's gradient is summed over the ranks by a hook."""
    model = Block()
    if mesh is not None:
        _by_hand(model, mesh)
        group = mesh.get_group("tp")
        model.slope.register_hook(lambda gradient: _summed(gradient, group, 1.0))
    return model


def by_hand_slope_not_summed(mesh: DeviceMesh | None = None) -> nn.Module:
    return _by_hand(Block(), mesh) if mesh is not None else Block()


def by_hand_slope_averaged(mesh: DeviceMesh | None = None) -> nn.Module:
    model = Block()
    if mesh is not None:
        _by_hand(model, mesh)
        group = mesh.get_group("tp")
        model.slope.register_hook(lambda gradient: _summed(gradient, group, 1 / group.size()))
    return model


def by_hand_frozen(mesh: DeviceMesh | None = None) -> nn.Module:
    """Sharding freezes a norm."""
    model = Block()
    if mesh is not None:
        _by_hand(model, mesh)
        group = mesh.get_group("tp")
        model.slope.register_hook(lambda gradient: _summed(gradient, group, 1.0))
        model.norm.weight.requires_grad_(False)
    return model


def by_hand_half_logits(mesh: DeviceMesh | None = None) -> nn.Module:
    """The head is colwise, and nobody gathers its logits."""
    if mesh is None:
        return Block()
    model = _by_hand(Block(), mesh, head=ColwiseParallel())
    group = mesh.get_group("tp")
    model.slope.register_hook(lambda gradient: _summed(gradient, group, 1.0))
    return model


def by_hand_untied(mesh: DeviceMesh | None = None) -> nn.Module:
    """The head gets a parameter of its own, as whatever makes a new one does."""
    model = Block(tied=True)
    if mesh is not None:
        _by_hand(model, mesh)
        group = mesh.get_group("tp")
        model.slope.register_hook(lambda gradient: _summed(gradient, group, 1.0))
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    return model


def _summed(gradient: Tensor, group: Any, factor: float) -> Tensor:
    summed = gradient.clone()
    torch.distributed.all_reduce(summed, group=group)
    return summed * factor


def by_hand_alone(mesh: DeviceMesh | None = None) -> nn.Module:
    """Its rank 1 fails while rank 0 waits for it."""
    model = Block()
    if mesh is not None:
        _by_hand(model, mesh)
        if torch.distributed.get_rank() == 1:
            model.up.register_forward_pre_hook(_fail)
    return model


def _fail(*_: Any) -> None:
    raise RuntimeError("only here")


class Fused(nn.Module):
    """A block whose gate and up lie in one weight. layout: halves (gate, then up), unfolded (the same, as a
    dim of its own), pairs (every second row)."""

    def __init__(self, layout: str, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.gate_up = nn.Linear(16, 2 * width, bias=False)
        self.down = nn.Linear(width, 16, bias=False)
        self.head = nn.Linear(16, 32, bias=False)
        self.layout = layout

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden = self.embed(ids_BS)
        both = self.gate_up(hidden)
        match self.layout:
            case "halves":
                gate, up = both.chunk(2, -1)
            case "unfolded":
                gate, up = both.unflatten(-1, (2, -1)).unbind(-2)
            case _:
                gate, up = both[..., ::2], both[..., 1::2]
        out: Tensor = self.head(hidden + self.down(torch.sigmoid(gate) * up))
        return out


def _fused(layout: str, mesh: DeviceMesh | None) -> nn.Module:
    model = Fused(layout)
    if mesh is not None:
        parallelize_module(
            model,
            mesh["tp"] if mesh.ndim > 1 else mesh,
            {"gate_up": ColwiseParallel(), "down": RowwiseParallel()},
        )
    return model


def fused_halves(mesh: DeviceMesh | None = None) -> nn.Module:
    """Wrong: rank 0 has the gates alone."""
    return _fused("halves", mesh)


def fused_unfolded(mesh: DeviceMesh | None = None) -> nn.Module:
    """Wrong in the same way, and no split shows it."""
    return _fused("unfolded", mesh)


def fused_pairs(mesh: DeviceMesh | None = None) -> nn.Module:
    """Right: each rank has pairs."""
    return _fused("pairs", mesh)


class Heads(nn.Module):
    """Queries, keys and values of each head lie together in one weight, as gpt_neox has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.qkv = nn.Linear(16, 48)
        self.o = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden = self.embed(ids_BS)
        q, k, v = self.qkv(hidden).unflatten(-1, (-1, 3 * 4)).transpose(1, 2).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.head(hidden + self.o(attended.transpose(1, 2).flatten(-2)))
        return out


def fused_by_head(mesh: DeviceMesh | None = None) -> nn.Module:
    """Right: each rank has heads."""
    model = Heads()
    if mesh is not None:
        parallelize_module(
            model, mesh["tp"] if mesh.ndim > 1 else mesh, {"qkv": ColwiseParallel(), "o": RowwiseParallel()}
        )
    return model


def by_hand_norm_of_parts(mesh: DeviceMesh | None = None) -> nn.Module:
    """Right: the norm runs on a part of the sequence, by PyTorch's own styles, which sum its gradient; the
    slope is summed by a hook."""
    model = Block()
    if mesh is not None:
        tp = mesh["tp"] if mesh.ndim > 1 else mesh
        cut = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
        )
        parallelize_module(model.norm, tp, cut)
        _by_hand(model, mesh, norm=SequenceParallel(), up=ColwiseParallel(input_layouts=Shard(1)))
        group = mesh.get_group("tp")
        model.slope.register_hook(lambda gradient: _summed(gradient, group, 1.0))
    return model


def by_hand_norm_of_whole(mesh: DeviceMesh | None = None) -> nn.Module:
    """The norm takes its input for a part of the sequence, which is whole."""
    model = Block()
    if mesh is not None:
        _by_hand(model, mesh, norm=SequenceParallel(use_local_output=True))
        group = mesh.get_group("tp")
        model.slope.register_hook(lambda gradient: _summed(gradient, group, 1.0))
    return model


class Odd(Block):
    """33 rows to share out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 33), nn.Linear(33, 16)


def by_hand_odd_width(mesh: DeviceMesh | None = None) -> nn.Module:
    """PyTorch's rowwise style takes every rank's part for as wide as its own."""
    model = Odd()
    return _by_hand(model, mesh) if mesh is not None else model


class Counted(nn.Module):
    """Writes a line whenever it runs, into the file that FORWARDS names."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        with Path(os.environ["FORWARDS"]).open("a") as lines:
            lines.write(f"{self.name}\n")
        logits: Tensor = self.head(self.embed(ids_BS))
        return logits


def counted() -> nn.Module:
    return Counted("counted")


def counted_too() -> nn.Module:
    return Counted("counted too")
