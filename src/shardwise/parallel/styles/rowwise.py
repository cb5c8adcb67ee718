"""rowwise: each rank has a part of the input's side of a weight, and the ranks' results are summed.

embedding  own rows of the vocabulary: each rank looks up the ids that it owns and has zeros for the others;
           reduce-scattered over the sequence, or all-reduced where `output` is replicate
linear     own columns [out, in/T]; `input` shard(-1): taken as it is, replicate: the own slice of it;
           `output` replicate: all-reduced, shard(1): reduce-scattered, so that a bias's gradient is a part
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from shardwise.core.errors import PlanError
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.embedding import EmbeddingShard, TableSharder, by_destination
from shardwise.parallel.layers import SEQUENCE_DIM, LinearSharder, local_or_none
from shardwise.parallel.parameters import local_weight, take_whole_tensors, to_torch
from shardwise.parallel.sharder import Assignment, Reasons, Work, refuse_below_gather_input
from shardwise.parallel.watch import show

NO_ROW = -1


class RowwiseTable(TableSharder):
    cut_dim = 0
    twin_style = RowwiseParallel
    twin_keeps_whole_gradient = True
    reasons = Reasons(
        "Each rank looked up the ids of its own rows and has zeros for all others: the sum over the ranks is "
        "the embedding.",
        "Every rank owns some rows of the table, and any token may have used one of them: each needs the "
        "gradient of all tokens.",
    )

    def look_up(self, shard: EmbeddingShard, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis, site = shard.site.axis, shard.site
        if not shard.sequence_parallel:
            own_BSH = look_up_own(shard, weight, ids_BS)
            origin = site.origin(Partial(), Replicate())
            return collectives.all_reduce(own_BSH, axis, grad_placement=Replicate(), origin=origin)
        own_TBLH = look_up_own(shard, weight, by_destination(ids_BS, axis.size))
        origin = site.origin(Partial(), Shard(1))
        own_1BLH = collectives.reduce_scatter(own_TBLH, 0, axis, grad_placement=Shard(0), origin=origin)
        return own_1BLH.view(ids_BS.shape[0], -1, weight.shape[1])


class RowwiseLinear(LinearSharder):
    inputs = (Shard(-1), Replicate())
    outputs = (Replicate(), Shard(1))
    cut_dim = 1
    what = "columns"

    def check_below_gather_input(self, assignment: Assignment) -> None:
        if self.input_of(assignment.style) == Replicate():
            refuse_below_gather_input(assignment, "Leave input out, and make the layer before it colwise.")

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, site = assignment.module, work.site(assignment)
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        bias_grad: Placement = Partial() if after == Shard(SEQUENCE_DIM) else Replicate()
        work.replace(module, "weight", Shard(1), Shard(1))
        work.replace(module, "bias", Replicate(), bias_grad)
        take_whole_tensors(module)

        def forward(x: Tensor) -> Tensor:
            if before == Replicate():
                origin = site.origin(Replicate(), Shard(-1))
                x = collectives.split(x, -1, site.axis, grad_placement=Shard(-1), origin=origin)
            y = _summed(F.linear(x, local_weight(module.weight, Shard(1))), after, site)
            bias = local_or_none(module.bias, bias_grad)
            return y if bias is None else y + bias

        module.forward = forward

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle:
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        return RowwiseParallel(input_layouts=to_torch(before), output_layouts=to_torch(after))


SHARDERS = {nn.Linear: RowwiseLinear(), nn.Embedding: RowwiseTable()}


def _summed(y: Tensor, after: Placement, site: Site) -> Tensor:
    """Summands to their sum, or to the own part of it."""
    axis, origin = site.axis, site.origin(Partial(), after)
    if after == Replicate():
        return collectives.all_reduce(y, axis, grad_placement=Replicate(), origin=origin)
    size = y.shape[SEQUENCE_DIM]
    if size % axis.size:
        raise PlanError(
            f"{site.module}: rule {site.rule} cuts a sequence of {size} over tp={axis.size}. Use a multiple "
            f"of {axis.size}."
        )
    return collectives.reduce_scatter(y, SEQUENCE_DIM, axis, grad_placement=after, origin=origin)


def look_up_own(shard: EmbeddingShard, weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of the ids that this rank owns, zeros for the others."""
    ownership = shard.ownership
    rows = torch.where(ownership.owner(ids) == shard.site.axis.rank, ownership.local(ids), NO_ROW)
    show("own_rows", rows)
    padding_row = shard.padding_row()
    grad_rows = rows if padding_row is None else rows.masked_fill(rows == padding_row, NO_ROW)
    return _LookUpOwn.apply(weight, rows, grad_rows)  # type: ignore[no-any-return]


class _LookUpOwn(torch.autograd.Function):
    """Rows of a table shard, zeros where `rows` is NO_ROW; no gradient goes where `grad_rows` is NO_ROW."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, grad_rows: Tensor) -> Tensor:
        ctx.save_for_backward(grad_rows)
        ctx.n_rows = weight.shape[0]
        out = weight.new_zeros(*rows.shape, weight.shape[1])
        if rows.device.type == "cpu":  # which tokens are own is known here and now: look up just those
            positions = (rows.view(-1) != NO_ROW).nonzero().view(-1)
            own = rows.view(-1)[positions].to(weight.device, non_blocking=True)
            positions = positions.to(weight.device, non_blocking=True)
            out.view(-1, weight.shape[1]).index_copy_(0, positions, weight.index_select(0, own))
        elif weight.shape[0]:  # clamping ids to a shard of size 0 would fail
            torch.where((rows == NO_ROW).unsqueeze(-1), out, F.embedding(rows.clamp(min=0), weight), out=out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (grad_rows,) = ctx.saved_tensors
        # tokens without a row go to one more row, which the op leaves out as its padding
        spare = ctx.n_rows
        indices = grad_rows.masked_fill(grad_rows == NO_ROW, spare).to(grad.device, non_blocking=True)
        grad_weight = torch.ops.aten.embedding_dense_backward(grad, indices, spare + 1, spare, False)
        return grad_weight[:spare], None, None
