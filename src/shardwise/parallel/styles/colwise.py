"""colwise: each rank has a part of what a weight gives.

embedding  own columns of the table: each rank looks up its slice of every token's row, in the order of their
           destination, and slices are swapped for whole rows of the own tokens; all-gathered where `output`
           is replicate
linear     own rows [out/T, in]. `input` replicate: its gradient is summed over the ranks; shard(1): gathered,
           its gradient reduce-scattered; below a gather_input it is taken as it is. `output` shard(-1): as
           computed; replicate: gathered. The head's logits stay cut, for a loss that takes them so.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from shardwise.core.errors import PlanError
from shardwise.core.placement import Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.embedding import EmbeddingShard, TableSharder, by_destination
from shardwise.parallel.layers import SEQUENCE_DIM, LinearSharder, gather_input, local_or_none
from shardwise.parallel.loss import VocabParallelLoss
from shardwise.parallel.ownership import RowOwnership
from shardwise.parallel.parameters import local_weight, take_whole_tensors, to_torch
from shardwise.parallel.sharder import Assignment, Fit, Reasons, Work, divisors


class ColwiseTable(TableSharder):
    cut_dim = 1
    twin_style = ColwiseParallel
    reasons = Reasons(
        "Each rank looked up its slice of every token's row: slices of all tokens are swapped for whole rows "
        "of the own tokens.",
        "Whole rows of the own tokens' gradient become slices of all tokens: each rank owns a slice of every "
        "row.",
    )

    def check(self, assignment: Assignment, fit: Fit) -> None:
        super().check(assignment, fit)
        module = assignment.module
        if module.embedding_dim % fit.tp:
            raise PlanError(
                f"rule {assignment.rule} splits hidden {module.embedding_dim} of {assignment.name} over "
                f"tp={fit.tp}. Use tp in {divisors(module.embedding_dim)}."
            )

    def look_up(self, shard: EmbeddingShard, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis = shard.site.axis
        if not shard.sequence_parallel:
            slices_BSh = F.embedding(ids_BS.to(weight.device, non_blocking=True), weight, shard.padding_idx)
            full, origin = weight.shape[1] * axis.size, shard.site.origin(Shard(2), Replicate())
            return collectives.all_gather(
                slices_BSh, 2, axis, full_size=full, grad_placement=Replicate(), origin=origin
            )
        ids_TBL = by_destination(ids_BS, axis.size).to(weight.device, non_blocking=True)
        own_NH: Tensor = _LookUpSlices.apply(weight, ids_TBL.flatten(1), shard.padding_idx, shard.site)
        return own_NH.view(ids_BS.shape[0], -1, own_NH.shape[1])


class ColwiseLinear(LinearSharder):
    inputs = (Replicate(), Shard(1))
    outputs = (Shard(-1), Replicate())
    cut_dim = 0
    what = "rows"
    takes_tied_table = True

    def check_below_gather_input(self, assignment: Assignment) -> None:
        if self.input_of(assignment.style) == Shard(SEQUENCE_DIM):
            raise PlanError(
                f"rule {assignment.rule}: input is shard(1), but a gather_input above {assignment.name} has "
                "made it whole. Leave input out."
            )

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, site = assignment.module, work.site(assignment)
        before = None if assignment.is_input_whole else self.input_of(assignment.style)
        after = self.output_of(assignment.style)
        table = work.tables.get(id(module.weight))
        work.replace(module, "weight", Shard(0), Shard(0))
        work.replace(module, "bias", Shard(0), Shard(0))
        own_rows = _rows_of(assignment, table, work)

        def forward(x: Tensor) -> Tensor:
            if before is not None:
                x = gather_input(x, before, site)
            y = F.linear(x, own_rows(), local_or_none(module.bias, Shard(0)))
            if after == Shard(-1):
                return y
            full, origin = module.out_features, site.origin(Shard(-1), Replicate())
            return collectives.all_gather(
                y, -1, site.axis, full_size=full, grad_placement=Replicate(), origin=origin
            )

        module.forward = forward
        if after == Shard(-1) and assignment.module is work.head:
            is_cut_by_rows = table is not None and table.weight_placement == Shard(0)
            own = table.ownership if table is not None and is_cut_by_rows else None
            work.loss = VocabParallelLoss(site, own or RowOwnership(module.out_features, work.axis.size))

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle:
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        return ColwiseParallel(
            input_layouts=to_torch(before), output_layouts=to_torch(after), use_local_output=not keeps_dtensor
        )


SHARDERS = {nn.Linear: ColwiseLinear(), nn.Embedding: ColwiseTable()}


def _rows_of(assignment: Assignment, table: EmbeddingShard | None, work: Work) -> Callable[[], Tensor]:
    """How a linear layer gets its own rows of its weight: they are there, or the table that it is tied to has
    them."""
    module = assignment.module
    if table is None:
        take_whole_tensors(module)
        return lambda: local_weight(module.weight, Shard(0))
    table.order_rows(assignment, work)
    to_rows = table.rows_for_head(work.site(assignment), module.out_features, module.in_features)
    return lambda: to_rows(local_weight(module.weight, table.grad_placement))


class _LookUpSlices(torch.autograd.Function):
    """Slices of rows for every rank, whole rows of the own tokens back: ids [T, N] and columns [V, h] -> [N,
    T x h].

    What a rank needs of its own columns never takes part in the all-to-all: it is looked up into its place.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids_TN: Tensor, padding_idx: int | None, site: Site) -> Tensor:
        axis, width = site.axis, weight.shape[1]
        others = [rank for rank in range(axis.size) if rank != axis.rank]
        own_ids, other_ids = ids_TN[axis.rank], ids_TN[others].flatten()
        ctx.save_for_backward(own_ids, other_ids)
        ctx.saved = (weight.shape[0], padding_idx, site, others)
        out = weight.new_empty(len(own_ids), axis.size, width)
        torch.index_select(weight, 0, own_ids, out=out[:, axis.rank])
        if others:
            slices = weight.index_select(0, other_ids).view(len(others), -1, width)
            received = collectives.swap_others_now(slices, axis, site.origin(Shard(2), Shard(1)))
            for rank, part in zip(others, received, strict=True):
                out[:, rank] = part
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> Any:
        own_ids, other_ids = ctx.saved_tensors
        n_rows, padding_idx, site, others = ctx.saved
        grad_NTh = grad_NH.unflatten(1, (site.axis.size, -1))
        own_Nh = grad_NTh[:, site.axis.rank]
        received = own_Nh.new_empty(0, *own_Nh.shape)
        if others:
            slices = torch.stack([grad_NTh[:, rank] for rank in others])
            received = collectives.swap_others_now(slices, site.axis, site.origin(Shard(1), Shard(2)))
        received_Mh = received.flatten(0, 1)
        if site.axis.device_type == "cpu":
            # added from where it lies: on a CPU fresh memory for both parts side by side would cost more than
            # the adding
            grad_weight = (
                own_Nh.new_zeros(n_rows, own_Nh.shape[1])
                .index_add_(0, own_ids, own_Nh)
                .index_add_(0, other_ids, received_Mh)
            )
            if padding_idx is not None:
                grad_weight[padding_idx] = 0
        else:  # index_add_ would add in random order there
            rows, ids = torch.cat((own_Nh, received_Mh)), torch.cat((own_ids, other_ids))
            no_row = -1 if padding_idx is None else padding_idx
            grad_weight = torch.ops.aten.embedding_dense_backward(rows, ids, n_rows, no_row, False)
        return grad_weight, None, None, None
