"""Models whose attention is flex attention, for plans; each factory is one model."""

import torch
from torch import Tensor, nn
from torch._higher_order_ops.cond import cond_op
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

VOCAB, HEADS, KEYS, HEAD, WIDTH = 32, 4, 2, 6, 24


class Attention(nn.Module):
    """Grouped queries, masked so that tokens see their own document's past; a gate for each head out of the
    sums of its scores. sloped: scores have a slope for each head."""

    def __init__(self, sloped: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, KEYS * HEAD, bias=False) for _ in range(2))
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.sloped = sloped

    def forward(self, x: Tensor, documents_BS: Tensor) -> Tensor:
        batch, seq, _ = x.shape

        def within(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents_BS[b, query] == documents_BS[b, key])

        def slope(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - 2.0**-h * (query - key)

        q, k, v = (each(x).view(batch, seq, -1, HEAD).transpose(1, 2) for each in (self.q, self.k, self.v))
        mask = create_block_mask(within, batch, None, seq, seq, device=documents_BS.device.type)
        out, aux = flex_attention(
            q, k, v,
            score_mod=slope if self.sloped else None,
            block_mask=mask,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert aux.lse is not None
        gated = out * torch.sigmoid(aux.lse - self.sinks[:, None])[..., None]
        given: Tensor = self.o(gated.transpose(1, 2).flatten(2).to(x.dtype))
        return given


class Attending(nn.Module):
    def __init__(self, sloped: bool) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(VOCAB, WIDTH), Attention(sloped)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden = self.embed(ids_BS)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden + self.attention(hidden, (ids_BS == 0).cumsum(1))
        logits: Tensor = self.head(hidden)
        return logits


def by_documents() -> nn.Module:
    return Attending(sloped=False)


def with_slopes() -> nn.Module:
    return Attending(sloped=True)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        hidden = self.embed(ids_BS)
        hidden = cond_op(hidden.sum() > 0, torch.sin, torch.cos, (hidden,))
        logits: Tensor = self.head(hidden)
        return logits


def by_a_condition() -> nn.Module:
    return Conditional()
