"""Models whose modules do what tests of dims and of made plans ask about; each factory is one model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import own_modules as own

HEADS, HEAD, WIDTH, GROUPS = 4, 6, 24, 2


class Grouped(nn.Module):
    """Fewer key heads than query heads, repeated by a number of its own; a norm over each head by groups of
    channels; a slope for each head out of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.repeats = HEADS, HEADS // GROUPS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * GROUPS * HEAD, bias=False)
        self.norm = nn.GroupNorm(HEADS, WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, self.heads, -1).transpose(1, 2)
        kv = self.kv(x).view(batch, seq, -1, 2 * HEAD).transpose(1, 2)
        k, v = kv.repeat_interleave(self.repeats, 1).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.o(self.norm(mixed.flatten(0, 1)).view_as(mixed))  # type: ignore[no-any-return]


class Sloped(nn.Module):
    """Attention whose scores have a slope for each head, from a table of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", torch.ones(2 * HEADS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        slopes = self.slopes[: self.heads].view(-1, 1, 1)  # type: ignore[index]
        scores = (q @ k.mT + slopes).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """A convolution along the sequence, each channel by itself, by a module that holds how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.conv = nn.Conv1d(2 * WIDTH, 2 * WIDTH, 3, groups=2 * WIDTH, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(self.up(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.down(F.silu(mixed))  # type: ignore[no-any-return]


class Square(nn.Module):
    """Without a norm and as wide inside as outside: the residual ties its hidden width to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.down(F.silu(self.up(x)) + x))


class Stack(nn.Module):
    """ids [B, S] -> logits [B, S, V]."""

    def __init__(self, *layers: nn.Module, vocab: int = 40, norm: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) if norm else nn.Identity() for _ in layers)
        self.head = nn.Linear(WIDTH, vocab, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.embed(ids_BS)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)  # type: ignore[no-any-return]


class Padded(Stack):
    """Gives padding the row of one id, which it reads by its number; its head has the same table."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.head.weight = self.embed.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        row = self.embed.weight[37]
        x = torch.where((ids_BS == 0)[..., None], row, self.embed(ids_BS))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)  # type: ignore[no-any-return]


def padded() -> nn.Module:
    return Padded(Grouped(), Grouped())


def grouped() -> nn.Module:
    return Stack(Grouped(), Grouped())


def convolved() -> nn.Module:
    return Stack(Gated(), Gated())


def sloped() -> nn.Module:
    return Stack(Sloped(), Sloped())


def square() -> nn.Module:
    return Stack(Square(), Square(), norm=False)


def odd() -> nn.Module:
    return Stack(Grouped(), Grouped(), vocab=41)


def fused() -> nn.Module:
    return own.Model(own.FusedAttention, own.Chunked, own.RmsNorm)


def turned() -> nn.Module:
    """Weights [in, out] and parameters that are read by name; tied."""
    return own.Model(own.GroupedAttention, own.FusedConv, own.RmsNorm, tied=True)


def scanned() -> nn.Module:
    return own.Model(own.Scan, own.ByName)


class Spared(Stack):
    """With a projection and a table that its forward doesn't use."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.spare, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(16, WIDTH)


def spared() -> nn.Module:
    return Spared(Grouped(), Grouped())
