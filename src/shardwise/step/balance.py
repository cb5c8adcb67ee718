"""Auxiliary losses of routers within a step: over which ranks their means are taken, and what they add to the
step's loss. See models/balance.py."""

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwise.core.collective import Origin
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.placement import Partial, Replicate
from shardwise.models.balance import balances_in
from shardwise.parallel.apply import applied_to
from shardwise.parallel.exchanges import sum_over_now

_WHY = (
    "A router's auxiliary loss is a product of two means over all tokens: how many each expert gets, and how "
    "probable the router found it. Both are summed over the ranks that see other tokens."
)


class Balances:
    """A model's auxiliary losses. tokens: the ranks that see other tokens, of which there are `n_ranks`."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None, tokens: dist.ProcessGroup | None) -> None:
        self._balances = balances_in(model)
        self._n_ranks = tokens.size() if tokens is not None else 1
        parts = applied_to(model).parts
        for name, balance in self._balances.items():
            router = name.rpartition(".")[0]
            groups = [tokens] if tokens is not None else []
            # where tp ranks each have a part of the router's gradient, the loss is shared out over them too,
            # whether they see other tokens or all see the same
            if mesh is not None and any(each.startswith(f"{router}.") for each in parts):
                group = mesh.get_group(TENSOR_AXIS)
                groups += [group] if group.size() > 1 else []
            balance.sum_over = partial(_sum, groups, Origin(name, None, Partial(), Replicate()))

    def begin(self, micro_batches: int) -> None:
        """A step begins."""
        for balance in self._balances.values():
            balance.begin(micro_batches)

    def add_to(self, loss: Tensor) -> Tensor:
        """This rank's loss, which is to be summed over `tokens`, and its share of the auxiliary ones."""
        for balance in self._balances.values():
            if balance.value is not None:
                loss = loss + (balance.value / self._n_ranks).to(loss.dtype)
        return loss


def _sum(groups: Sequence[dist.ProcessGroup], origin: Origin, sums: Tensor) -> None:
    for group in groups:
        sum_over_now(sums, group, origin, _WHY)
