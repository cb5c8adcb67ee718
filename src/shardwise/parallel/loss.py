"""Cross-entropy for both engines, normalised over the valid labels of the global batch; sharded logits are
never gathered.

Vocabulary-parallel, T ranks, each with logits [N, V/T] of every token (N = B x S tokens). With m_r, s_r the
local maximum and sum of exponentials, every rank sends (lse_r = m_r + log s_r, x_r = the label's logit or 0)
in one all-gather of 2 N floats, and then

    lse = logsumexp_r(lse_r),  loss = sum over valid tokens of (lse - sum_r x_r) / valid
    d loss / d logit = (exp(logit - lse) - [logit is the label's]) / valid

Softmax runs in float32 at least. Source of the scheme: Shoeybi et al. 2019 (Megatron-LM), section 3, which
sends three all-reduces.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.core.placement import Replicate, Shard
from shardwise.parallel import exchanges
from shardwise.parallel.axis import Site
from shardwise.parallel.ownership import RowOwnership
from shardwise.parallel.watch import show

IGNORED = -100


class Loss(Protocol):
    """Mean cross-entropy of logits [B, S, V or V/T] and labels [B, S] (IGNORED ones don't count).

    valid: labels that count in the whole global batch, where this rank sees a part of it (data parallel,
    micro-batches); by default those of `labels`. The result is this rank's summand of the global mean. Run
    the backward inside `backward_context()`.
    """

    def __call__(self, logits: Tensor, labels_BS: Tensor, valid: Tensor | int | None = None) -> Tensor: ...

    def backward_context(self) -> AbstractContextManager[None]: ...


def count_valid(labels_BS: Tensor) -> Tensor:
    """Labels that count: a scalar tensor."""
    return (labels_BS != IGNORED).sum()


@dataclass(frozen=True, slots=True)
class PlainLoss:
    """For whole logits."""

    def __call__(self, logits: Tensor, labels_BS: Tensor, valid: Tensor | int | None = None) -> Tensor:
        if valid is None:
            valid = count_valid(labels_BS)
        logits_NV = logits.flatten(0, 1)
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        return F.cross_entropy(logits_NV, labels_BS.flatten(), ignore_index=IGNORED, reduction="sum") / valid

    def backward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True, slots=True)
class VocabParallelLoss:
    """For plain local logits [B, S, V/T] of the native engine."""

    site: Site
    ownership: RowOwnership

    def __call__(self, logits: Tensor, labels_BS: Tensor, valid: Tensor | int | None = None) -> Tensor:
        expected = self.ownership.rows_of(self.site.axis.rank)
        if logits.shape[-1] != expected:
            raise AssertionError(
                f"loss: logits have {logits.shape[-1]} columns, this rank's part of the vocabulary has "
                f"{expected}"
            )
        if valid is None:
            valid = count_valid(labels_BS)
        labels_N = labels_BS.flatten()
        valid_N = labels_N != IGNORED
        ids_N = labels_N.masked_fill(~valid_N, 0)
        mine_N = valid_N & (self.ownership.owner(ids_N) == self.site.axis.rank)
        columns_N = torch.where(mine_N, self.ownership.local(ids_N), -1)
        show("own_columns", columns_N)
        total: Tensor = _VocabParallelSum.apply(logits.flatten(0, 1), valid_N, columns_N, self.site)
        return total / valid

    def backward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True, slots=True)
class DTensorLoss:
    """For DTensor logits Shard(-1): PyTorch's own loss_parallel, as torchtitan uses it."""

    def __call__(self, logits: Tensor, labels_BS: Tensor, valid: Tensor | int | None = None) -> Tensor:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.parallel import loss_parallel

        if valid is None:
            valid = count_valid(labels_BS)
        with loss_parallel():
            loss = F.cross_entropy(
                logits.flatten(0, 1).float() if logits.dtype != torch.float64 else logits.flatten(0, 1),
                labels_BS.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
        return (loss.to_local() if isinstance(loss, DTensor) else loss) / valid

    @contextmanager
    def backward_context(self) -> Iterator[None]:
        from torch.distributed.tensor.parallel import loss_parallel

        with loss_parallel():
            yield


def _weights(logits_NV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(w [N, V/T], c [N], lse [N]) in `dtype`: exp(logit) = w exp(c), and lse = logsumexp of each row. w is
    the only new tensor of its size."""
    if logits_NV.dtype == dtype:
        probabilities_NV = torch.softmax(logits_NV, dim=1)
        # the largest logit has probability 1/s_r, so lse_r = m_r + log s_r needs no pass of its own
        local_lse_N = logits_NV.amax(1) - probabilities_NV.amax(1).log()
        return probabilities_NV, local_lse_N, local_lse_N
    weights_NV = logits_NV.to(dtype)  # softmax would make a copy in this dtype, and then its result
    largest_N = weights_NV.amax(1)
    sums_N = weights_NV.sub_(largest_N.unsqueeze(1)).exp_().sum(1)
    return weights_NV, largest_N, largest_N + sums_N.log()


class _VocabParallelSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, valid_N: Tensor, columns_N: Tensor, site: Site) -> Tensor:
        dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
        mine_N = columns_N >= 0
        picked_N = columns_N.clamp(min=0).unsqueeze(1)
        n_tokens, width = logits_NV.shape
        if width:
            weights_NV, log_scale_N, local_lse_N = _weights(logits_NV, dtype)
            target_N = torch.where(mine_N, logits_NV.gather(1, picked_N).squeeze(1).to(dtype), 0)
        else:
            weights_NV = logits_NV.new_empty(n_tokens, 0, dtype=dtype)
            log_scale_N = local_lse_N = logits_NV.new_full((n_tokens,), -torch.inf, dtype=dtype)
            target_N = logits_NV.new_zeros(n_tokens, dtype=dtype)
        axis = site.axis
        stats_2N = torch.stack((local_lse_N, target_N))
        stats_T2N = exchanges.gather_now(
            stats_2N.unsqueeze(0), 0, axis, axis.size, site.origin(Shard(-1), Replicate())
        )
        lse_N = torch.logsumexp(stats_T2N[:, 0], dim=0)
        losses_N = torch.where(valid_N, lse_N - stats_T2N[:, 1].sum(0), 0)
        show("lse", lse_N)
        show("losses", losses_N)
        ctx.save_for_backward(weights_NV, (log_scale_N - lse_N).exp() * valid_N, mine_N, picked_N)
        ctx.dtype = logits_NV.dtype
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights_NV, scale_N, mine_N, picked_N = ctx.saved_tensors
        # the weights are this function's own and are used once: their memory becomes the gradient's
        grad_NV = weights_NV.mul_((scale_N * grad).unsqueeze(1))
        if grad_NV.shape[1]:
            grad_NV.scatter_add_(1, picked_N, torch.where(mine_N, -grad, 0).to(grad_NV.dtype).unsqueeze(1))
        return grad_NV.to(ctx.dtype), None, None, None
