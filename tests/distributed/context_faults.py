"""Faults planted into context parallelism, each of which trains without a word, and which the comparison must
see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from shardwise.core.collective import Origin
from shardwise.core.placement import Partial
from shardwise.parallel import exchanges
from shardwise.parallel.context import asked, gather, ring, share
from shardwise.parallel.context.asked import Backward, Together
from shardwise.parallel.context.blocks import Block


@dataclass(frozen=True, slots=True)
class Fault:
    """way: the attention that has it."""

    name: str
    way: str
    owner: Any
    attribute: str
    faulty: Callable[..., Any]

    @contextmanager
    def plant(self) -> Iterator[None]:
        with patch.object(self.owner, self.attribute, self.faulty):
            yield


def _contiguous(self: share.Sharing, length: int, device: torch.device) -> Tensor:
    return torch.arange(length * self.axis.size, device=device).view(self.axis.size, length)


def _from_zero(self: share.Sharing, ids_BS: Tensor) -> Tensor:
    return torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]


def _own_only(gradients: Tensor, dim: int, axis: Any, origin: Any) -> Tensor:
    """What this rank found for its own keys, without the others' summands."""
    own: Tensor = gradients.chunk(axis.size, dim)[axis.rank]
    return own


def _without_lse(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    return (out + more) / 2, torch.logaddexp(lse, more_lse)


def _of_the_block_alone(self: Backward, block: Block, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The backward with the lse of the block's keys, not of all."""
    together = Together(self._asked)
    together.add(Block(block.sources, slice(0, self._q.shape[-2]), block.keys), self._q, k, v)
    _, self._lse = together.result(self._q.dtype)
    return _TRUE_BACKWARD(self, block, k, v)


def _whole_square(rank: int, source: int, length: int, *, is_causal: bool) -> Block:
    """Every rank's keys are seen by all queries, as if they came before."""
    whole = slice(0, length)
    return Block(range(source, source + 1), whole, whole, is_diagonal=source == rank)


def _stays_where_it_is(x: Tensor, axis: Any, origin: Origin) -> exchanges.Shift:
    """Gradients; keys and values go round."""
    if origin.before == Partial():
        return exchanges.Shift(x, x, ())
    return exchanges.begin_shift(x, axis, origin)


_TRUE_BACKWARD = Backward.of

FAULTS = (
    Fault("positions are contiguous, tokens head-tail", "gather", share.Sharing, "_places", _contiguous),
    Fault("positions begin at 0 on every rank", "ring", share.Sharing, "_positions", _from_zero),
    Fault("gradients of gathered keys stay where they are", "gather", gather, "scatter_sum_now", _own_only),
    Fault("gradients on the ring don't come home", "ring", ring, "begin_shift", _stays_where_it_is),
    Fault("blocks are averaged, whatever their weights", "ring", asked, "merged", _without_lse),
    Fault("a ring's blocks are all seen", "ring", ring, "block_of", _whole_square),
    Fault("the backward knows one block's lse", "gather", Backward, "of", _of_the_block_alone),
)
