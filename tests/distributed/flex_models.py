"""Models whose attention is compiled flex attention, whose experts compute in bfloat16, and whose plan goes
wrong with one sequence only. Each is a factory that shards itself."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import grouped_mm

VOCAB, HIDDEN, HEAD, EXPERTS, INNER = 32, 16, 4, 4, 32
_attend: list[Callable[..., Any]] = []


def _compiled() -> Callable[..., Any]:
    """As libraries do it, once; here at the first call, for the compiler takes a second to import."""
    if not _attend:
        _attend.append(torch.compile(flex_attention))
    return _attend[0]


def causal(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


class Attention(nn.Module):
    """masked: with a causal mask of blocks, else with none."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.masked = masked

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        batch, seq, _ = hidden_BSH.shape
        q, k, v = (
            each(hidden_BSH).view(batch, seq, -1, HEAD).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        device = hidden_BSH.device
        mask = create_block_mask(causal, None, None, seq, seq, device=device) if self.masked else None
        heads: Tensor = _compiled()(q, k, v, block_mask=mask)
        out: Tensor = self.o(heads.transpose(1, 2).reshape(batch, seq, -1))
        return out


class Attending(nn.Module):
    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(VOCAB, HIDDEN), Attention(masked)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH = self.embed(ids_BS)
        logits: Tensor = self.head(hidden_BSH + self.attention(hidden_BSH))
        return logits


def _by_heads(mesh: DeviceMesh | None, output: RowwiseParallel) -> Attending:
    model = Attending()
    if mesh is not None:
        styles = dict.fromkeys(("q", "k", "v"), ColwiseParallel())
        parallelize_module(model.attention, mesh["tp"], {**styles, "o": output})
    return model


def flex_by_heads(mesh: DeviceMesh | None = None) -> nn.Module:
    return _by_heads(mesh, RowwiseParallel())


def flex_not_summed(mesh: DeviceMesh | None = None) -> nn.Module:
    """What attention's ranks give isn't summed: each adds its own part."""
    model = _by_heads(mesh, RowwiseParallel(output_layouts=Partial(), use_local_output=True))
    if mesh is not None:
        model.attention.register_forward_hook(lambda _, __, out: _plain(out))
    return model


def _plain(out: Tensor) -> Tensor:
    return out.to_local() if isinstance(out, DTensor) else out


class RoundedExperts(nn.Module):
    """Every token meets the expert of its place; products are in bfloat16, whatever the model is in."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / INNER**0.5)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        rows, (up, down) = hidden_BSH.flatten(0, 1), map(_plain, (self.up, self.down))
        each = rows.shape[0] // EXPERTS
        ends = torch.arange(each, rows.shape[0] + 1, each, dtype=torch.int32, device=rows.device)
        inner = torch.tanh(grouped_mm(rows.bfloat16(), up.bfloat16(), offs=ends))
        made: Tensor = grouped_mm(inner, down.bfloat16(), offs=ends).type_as(rows)
        return made.view_as(hidden_BSH)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(VOCAB, HIDDEN), RoundedExperts()
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH = self.embed(ids_BS)
        logits: Tensor = self.head(hidden_BSH + self.experts(hidden_BSH))
        return logits


def rounded_experts(mesh: DeviceMesh | None = None) -> nn.Module:
    """Each expert cut inside, as a mixture is under tensor parallelism."""
    model = Expert()
    if mesh is None:
        return model
    tp, experts = mesh["tp"], model.experts
    for name, dim in (("up", 2), ("down", 1)):
        whole = getattr(experts, name)
        setattr(experts, name, nn.Parameter(distribute_tensor(whole, tp, [Shard(dim)])))

    def enter(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        whole = DTensor.from_local(args[0], tp, [Replicate()], run_check=False)
        return (whole.to_local(grad_placements=[Partial()]),)

    def leave(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        parts = DTensor.from_local(out, tp, [Partial()], run_check=False)
        return parts.redistribute(tp, [Replicate()]).to_local()

    experts.register_forward_pre_hook(enter)
    experts.register_forward_hook(leave)
    return model


class Mixing(nn.Module):
    """Flattens sequences, and a head that is cut by columns takes the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, INNER, bias=False)
        self.down, self.head = nn.Linear(INNER, HIDDEN, bias=False), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSH = self.embed(ids_BS)
        logits: Tensor = self.head(hidden_BSH + self.down(torch.tanh(self.up(hidden_BSH))))
        return logits


def wrong_at_one_sequence(mesh: DeviceMesh | None = None) -> nn.Module:
    """What it takes in is detached where the batch dim is 1, as torch 2.13's local_map does it with a gather
    that is still under way and needs no copy."""
    model = Mixing()
    if mesh is not None:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        model.up.register_forward_pre_hook(
            lambda _, args: (args[0].detach() if args[0].shape[0] == 1 else args[0],)
        )
    return model


def one_rank_stays_away(mesh: DeviceMesh | None = None) -> nn.Module:
    """Rank 1 doesn't come to a sum that rank 0 waits for."""
    model = Mixing()
    if mesh is not None:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if mesh.get_rank() == 1:
            model.down.register_forward_pre_hook(lambda _, __: time.sleep(600))
    return model
