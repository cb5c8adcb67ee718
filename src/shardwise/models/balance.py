"""LoadBalance: the auxiliary loss that keeps a router from sending all tokens to a few experts, over the
tokens of a whole micro-batch, wherever they are.

    loss = coefficient x E x sum over experts e of f_e P_e

f_e: assignments to e over tokens, before any is dropped; P_e: the mean over tokens of e's probability. It is
a product of two means, so a mean of parts' losses isn't it. Its gradient is that of P alone, and P is a sum
over tokens: so each rank, knowing f and the number of tokens of all ranks (sum_over), has a summand of the
loss, whose gradient is right for its own tokens. Over micro-batches, each with means of its own, losses are
averaged; over layers they are added.

The loss never stands in a model's output: its gradient (1, as any summand of the step's loss has) enters
where the router's weights pass by, in whatever way the backward comes. Its value is kept for who reports the
loss.

Sources: Fedus et al. 2022 (Switch Transformer, equations 4 to 6), and transformers' load_balancing_loss_func
for more choices than one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.models.routing import ends_of
from shardwise.torch_private import in_backward


class LoadBalance(nn.Module):
    """Called with a router's weights [N, K], probabilities [N, E] and choices [N, K]; gives the weights.

    share: of the step's loss, 1 / micro-batches. sum_over: sums [2, E] over all ranks that see other tokens,
    in place. value: the sum of the losses since begin(), the same on all these ranks.
    """

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient
        self.sum_over: Callable[[Tensor], None] = _of_one_process
        self.begin(1)

    def begin(self, micro_batches: int) -> None:
        """A step of so many micro-batches begins."""
        self.share = 1 / micro_batches
        self.value: Tensor | None = None

    def forward(self, weights_NK: Tensor, probabilities_NE: Tensor, index_NK: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return weights_NK
        experts = probabilities_NE.shape[1]
        own_E = probabilities_NE.sum(0)
        ends_E = ends_of(index_NK.flatten().sort().values, experts)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(own_E.dtype)
        sums_2E = torch.stack((counts_E, own_E.detach()))
        self.sum_over(sums_2E)
        tokens = sums_2E[0].sum() / index_NK.shape[1]
        slope_E = self.coefficient * self.share * experts / tokens**2 * sums_2E[0]
        if not in_backward():  # a recomputed forward's loss is counted already
            value = (slope_E * sums_2E[1]).sum()
            self.value = value if self.value is None else self.value + value
        return _WithLoss.apply(weights_NK, (slope_E * own_E).sum())  # type: ignore[no-any-return]


def balances_in(model: nn.Module) -> dict[str, LoadBalance]:
    """By their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoadBalance)}


def _of_one_process(_: Tensor) -> None:
    """All tokens are here."""


class _WithLoss(torch.autograd.Function):
    """x as it is; the loss gets the gradient 1 when the backward passes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
