"""Attention on a ring: keys and values go round, a rank at a time, while each rank's queries meet those that
it has; what blocks give is put together by their lse.

n ranks, n - 1 turns of the forward. The backward is a second ring: keys and values go round again, and behind
them the gradients that ranks have found for them, which end at home: n - 1 turns of both. Own keys come
first, so a rank computes while the next ones come, and what it then computes goes on while it computes.
Source: Liu et al. 2023 (Ring Attention).
"""

from typing import Any

import torch
from torch import Tensor

from shardwise.core.placement import Partial
from shardwise.parallel.context.asked import Asked, Backward, Together, packed
from shardwise.parallel.context.blocks import Block, block_of
from shardwise.parallel.exchanges import Shift, begin_shift


def ring_attention(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
    """Out [B, N, L, E] of this rank's queries and all ranks' keys."""
    out: Tensor = _Ring.apply(q, k, v, asked)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        axis, together, held = asked.axis, Together(asked), packed(k, v)
        for turn in range(axis.size):
            coming = _sent_on(held, asked, turn)
            block = _block(turn, q, asked)
            together.add(block, q, *_keys_of(held, block, k.shape[-1]))
            if coming is not None:
                held = coming.wait()
        out, lse = together.result(q.dtype)
        ctx.asked = asked
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        asked: Asked = ctx.asked
        held, backward, home = packed(k, v), Backward(asked, grad, q, out, lse), _home(asked)
        own: Tensor | None = None
        returning: Shift | None = None
        for turn in range(asked.axis.size):
            coming = _sent_on(held, asked, turn)
            block = _block(turn, q, asked)
            found = packed(*backward.of(block, *_keys_of(held, block, k.shape[-1])))
            if turn == 0:
                own = found
            else:
                # what the ranks before have found for these keys, and zeros where none did
                whole = torch.zeros_like(held) if returning is None else returning.wait()
                whole[..., block.keys, :] += found
                returning = begin_shift(whole, asked.axis, home)
            if coming is not None:
                held = coming.wait()
        assert own is not None
        if returning is not None:
            own = own + returning.wait()
        return backward.dq, own[..., : k.shape[-1]], own[..., k.shape[-1] :], None


def _sent_on(held: Tensor, asked: Asked, turn: int) -> Shift | None:
    """What comes for the next turn, if there is one."""
    return begin_shift(held, asked.axis, asked.origin) if turn + 1 < asked.axis.size else None


def _block(turn: int, q: Tensor, asked: Asked) -> Block:
    """In each turn a rank has the keys of the rank before the one whose it had."""
    source = (asked.axis.rank - turn) % asked.axis.size
    return block_of(asked.axis.rank, source, q.shape[-2], is_causal=asked.is_causal)


def _keys_of(held: Tensor, block: Block, width: int) -> tuple[Tensor, Tensor]:
    chosen = held[..., block.keys, :]
    return chosen[..., :width], chosen[..., width:]


def _home(asked: Asked) -> Any:
    return asked.origin.turned(Partial(), asked.origin.before)
