"""Attention by an all-gather of keys and values, both in one collective, as Llama 3 was trained.

What was gathered isn't kept: the backward gathers again, and a reduce-scatter takes the gradients home. So
between the passes a rank holds its own part alone. Source: Dubey et al. 2024, 3.3.2.
"""

from typing import Any

import torch
from torch import Tensor

from shardwise.core.placement import Partial
from shardwise.parallel.context.asked import Asked, Backward, Together, packed
from shardwise.parallel.context.blocks import Block, blocks_of
from shardwise.parallel.exchanges import gather_now, scatter_sum_now


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
    """Out [B, N, L, E] of this rank's queries and all ranks' keys."""
    out: Tensor = _Gathered.apply(q, k, v, asked)
    return out


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        parts, together = _parts(k, v, asked), Together(asked)
        for block in _blocks(q, asked):
            together.add(block, q, *_keys_of(parts, block, k.shape[-1]))
        out, lse = together.result(q.dtype)
        ctx.asked = asked
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        asked: Asked = ctx.asked
        parts = _parts(k, v, asked)
        gradients = torch.zeros_like(parts)
        backward = Backward(asked, grad, q, out, lse)
        for block in _blocks(q, asked):
            found = packed(*backward.of(block, *_keys_of(parts, block, k.shape[-1])))
            by_source = found.unflatten(2, (len(block.sources), -1)).movedim(2, 0)
            gradients[block.sources.start : block.sources.stop, ..., block.keys, :] = by_source
        del parts
        home = asked.origin.turned(Partial(), asked.origin.before)
        own = scatter_sum_now(gradients.flatten(0, 1), 0, asked.axis, home)
        return backward.dq, own[..., : k.shape[-1]], own[..., k.shape[-1] :], None


def _parts(k: Tensor, v: Tensor, asked: Asked) -> Tensor:
    """Keys and values of all ranks, [ranks, B, K, L, D + E]."""
    own, ranks = packed(k, v), asked.axis.size
    whole = gather_now(own, 0, asked.axis, len(own) * ranks, asked.origin)
    parts: Tensor = whole.unflatten(0, (ranks, len(own)))
    return parts


def _blocks(q: Tensor, asked: Asked) -> list[Block]:
    axis = asked.axis
    return list(blocks_of(axis.rank, axis.size, q.shape[-2], is_causal=asked.is_causal))


def _keys_of(parts: Tensor, block: Block, width: int) -> tuple[Tensor, Tensor]:
    """A block's keys and values."""
    chosen = parts[block.sources.start : block.sources.stop, ..., block.keys, :]
    together = chosen.movedim(0, 2).flatten(2, 3)
    return together[..., :width], together[..., width:]
