"""Made plans and dims for tests of their reports: of small models of ours, and one of a user's with fused
weights and a part that can't be cut."""

from functools import cache

import torch
from torch import Tensor, nn

from shardwise.core.case import Case
from shardwise.core.dims import Dims
from shardwise.core.made_plan import MadePlan
from shardwise.verbs.plan import PlanOptions, dims, plan

LLAMA = "llama3-debug?n_layers=3"
FUSED = "tests.unit.plan_example:fused"
NORMED = "tests.unit.plan_example:normed"


@cache
def made(model: str = LLAMA, mesh: str = "tp=2", embedding: str = "rowwise") -> MadePlan:
    return plan(Case.of(model=model, mesh=mesh), PlanOptions(embedding))


@cache
def found(model: str = LLAMA, *plans: str) -> Dims:
    return dims(Case.of(model=model, mesh="tp=2", plans=plans))


class Block(nn.Module):
    """Query, key and value in one weight; a norm over all heads, so that they can't be cut."""

    def __init__(self, width: int, *, has_norm: bool) -> None:
        super().__init__()
        self.heads, self.width = 4, width
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width) if has_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        batch, seq, _ = hidden_BSD.shape
        query, key, value = self.qkv(hidden_BSD).split(self.width, dim=-1)
        split = (batch, seq, self.heads, -1)
        query, key, value = (each.view(split).transpose(1, 2) for each in (self.norm(query), key, value))
        scores = (query @ key.transpose(-1, -2)).softmax(-1)
        mixed: Tensor = self.out((scores @ value).transpose(1, 2).reshape(batch, seq, -1))
        return hidden_BSD + mixed


class Fused(nn.Module):
    def __init__(self, *, has_norm: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Block(32, has_norm=has_norm) for _ in range(2))
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden_BSD = self.embed(ids_BS)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD)
        logits: Tensor = self.head(hidden_BSD)
        return logits


def fused() -> nn.Module:
    torch.manual_seed(0)
    return Fused(has_norm=False)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return Fused(has_norm=True)
