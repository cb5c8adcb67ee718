"""Asked: one call of attention over a sequence that ranks share, without its tensors; and what blocks give
together.

Shapes as in kernels.py, with L a rank's tokens of each sequence, in the order in which it has them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.core.collective import Origin
from shardwise.parallel.axis import Axis
from shardwise.parallel.context.blocks import Block
from shardwise.parallel.context.kernels import Call, Gradients, Kernel, kernel_for, merged


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """is_causal: queries see no key that comes later in the sequence. mask: bool [B or 1, N or 1, L, ranks,
    L], True where a query sees a key of a rank; it hides later keys too where is_causal says so."""

    axis: Axis
    origin: Origin
    scale: float
    is_causal: bool
    mask: Tensor | None = None

    def call(self, block: Block) -> Call:
        """How a block is computed."""
        if self.mask is None:
            return Call(self.scale, block.is_diagonal)
        of_ranks = self.mask[:, :, block.queries, block.sources.start : block.sources.stop, block.keys]
        return Call(self.scale, mask=of_ranks.flatten(-2))

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
        return kernel_for(self.axis.device_type, q, k, v, is_masked=self.mask is not None)

    def again(self) -> "Asked":
        """The same without its mask, for tensors that are saved by themselves."""
        return replace(self, mask=None)


def packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one tensor [B, K, L, D + E], so that they travel together."""
    return torch.cat((k, v), -1)


class Together:
    """What the blocks that came so far give for all queries. The first must be of all of them."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, block: Block, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q: all queries; k, v: the block's."""
        queries = block.queries
        kernel, call = self._asked.kernel(q, k, v), self._asked.call(block)
        out, lse = kernel.forward(q[..., queries, :], k, v, call)
        if self._out is None or self._lse is None:
            self._out, self._lse = out, lse
            return
        before = slice(0, queries.start)
        more_out, more_lse = merged(
            self._out[..., queries, :].to(lse.dtype), self._lse[..., queries], out.to(lse.dtype), lse
        )
        if queries.start:
            more_out = torch.cat((self._out[..., before, :].to(lse.dtype), more_out), -2)
            more_lse = torch.cat((self._lse[..., before], more_lse), -1)
        self._out, self._lse = more_out, more_lse

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(out, lse)"""
        assert self._out is not None
        assert self._lse is not None
        return self._out.to(dtype), self._lse


class Backward:
    """Gradients of one call, block by block; dq is summed up here."""

    def __init__(self, asked: Asked, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        self._asked, self._grad, self._q, self._out, self._lse = asked, grad, q, out, lse
        self.dq: Tensor | None = None

    def of(self, block: Block, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the block's keys and values, by this rank's queries."""
        queries, kernel = block.queries, self._asked.kernel(self._q, k, v)
        found: Gradients = kernel.backward(
            self._grad[..., queries, :], self._q[..., queries, :], k, v, self._out[..., queries, :],
            self._lse[..., queries], self._asked.call(block),
        )  # fmt: skip
        dq, dk, dv = found
        if self.dq is None:
            self.dq = dq
        else:
            self.dq[..., queries, :] += dq
        return dk, dv
