"""rowwise: each rank has a part of the input's side of a weight, and the ranks' results are summed.

embedding  own rows of the vocabulary: each rank looks up the ids that it owns and has zeros for the others;
           reduce-scattered over the sequence, or all-reduced where `output` is replicate
linear     own columns [out, in/T]; `input` shard(-1): taken as it is, replicate: the own slice of it;
           `output` replicate: all-reduced, shard(1): reduce-scattered, so that a bias's gradient is a part
any other  as linear, by its own forward on what `parameters` says is cut; one that is a subclass of either is
           cut as they are. What takes ids (a scaled embedding) gets the own rows' ids, and zeros come out for
           the others. A parameter that is "replicate" is taken for a bias, which is added to the sum: rank 0
           adds it, others add zeros. What multiplies, each rank's part too, is "replicate, gradient partial"

`pieces`: the input is several things laid one after the other, and each rank has its part of each.
`gradient`: "partial" where what it gives whole goes on into what is cut, so that each rank computes a part of
its gradient: that is summed, too.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel import chunks, collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.counts import divide_counts
from shardwise.parallel.embedding import EmbeddingShard, TableSharder, by_destination, check_table_options
from shardwise.parallel.layers import SEQUENCE_DIM, LinearSharder, gather_input, local_or_none, sum_parts
from shardwise.parallel.leaves import CutLeaf, held_for_sum, own_names, uses_of, wholes
from shardwise.parallel.own_forward import change_first_output, change_first_tensor, on_local, wrap
from shardwise.parallel.parameters import local_weight, to_torch
from shardwise.parallel.sharder import Assignment, Fit, Reasons, Sharder, Work, refuse_below_gather_input
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

    def check(self, assignment: Assignment, fit: Fit) -> None:
        super().check(assignment, fit)
        _check_gradient(self, assignment)

    def check_below_gather_input(self, assignment: Assignment) -> None:
        _refuse_whole_input(self, assignment)

    def held(self, assignment: Assignment) -> dict[str, Held]:
        is_cut_after = self.output_of(assignment.style) == Shard(SEQUENCE_DIM)
        bias = Held(Replicate(), gradient=Partial() if is_cut_after else None)
        ways = {"weight": Held(Shard(1), assignment.style.pieces), "bias": bias}
        return {name: ways[name] for name in own_names(assignment.module)}

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, site = assignment.module, work.site(assignment)
        work.hold(assignment)
        divide_counts(assignment, work.axis.size)
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        bias_grad: Placement = Partial() if after == Shard(SEQUENCE_DIM) else Replicate()

        def forward(x: Tensor) -> Tensor:
            x = _own_features(x, before, site)
            y = sum_parts(F.linear(x, local_weight(module.weight, Shard(1))), after, site)
            bias = local_or_none(module.bias, bias_grad)
            return _gradient_summed(y if bias is None else y + bias, assignment, site)

        module.forward = forward

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle:
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        return RowwiseParallel(input_layouts=to_torch(before), output_layouts=to_torch(after))


class RowwiseLeaf(CutLeaf):
    """By the module's own forward."""

    inputs = RowwiseLinear.inputs
    outputs = RowwiseLinear.outputs
    by_class: ClassVar = {
        nn.Linear: {"weight": Held(Shard(1)), "bias": Held(Replicate())},
        nn.Embedding: {"weight": Held(Shard(0))},
    }

    def held(self, assignment: Assignment) -> dict[str, Held]:
        return held_for_sum(super().held(assignment))

    def check(self, assignment: Assignment, fit: Fit) -> None:
        super().check(assignment, fit)
        check_table_options(assignment)
        _check_gradient(self, assignment)
        if any(held.parts for held in assignment.held.values()):
            raise PlanError(
                f"rule {assignment.rule}: ranks that use the same part of {assignment.shown} would add it to "
                "the sum several times. Give each its own part, or use whole."
            )
        if assignment.style.pieces and self.input_of(assignment.style) == Replicate():
            raise PlanError(
                f"rule {assignment.rule}: pieces want the own part of the input. Leave input out."
            )

    def check_below_gather_input(self, assignment: Assignment) -> None:
        _refuse_whole_input(self, assignment)

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, site, style = assignment.module, work.site(assignment), assignment.style
        before, after = self.input_of(style), self.output_of(style)
        work.hold(assignment)
        divide_counts(assignment, work.axis.size)
        uses = uses_of(assignment, work, wholes(super().held(assignment)))
        once_anyway = uses_of(assignment, work)  # by the owner of a row
        rows = _own_rows(assignment, work)

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            taken: list[Tensor] = []

            def own(x: Tensor) -> Tensor:
                if x.is_floating_point():
                    return _own_features(x, before, site)
                taken.append(x)
                return (x - rows.start).clamp(0, len(rows) - 1)

            def summed(y: Tensor) -> Tensor:
                if taken:
                    is_own = (taken[0] >= rows.start) & (taken[0] < rows.stop)
                    y = torch.where(is_own.unsqueeze(-1).to(y.device), y, 0)
                return _gradient_summed(sum_parts(y, after, site), assignment, site)

            args, kwargs = change_first_tensor(args, kwargs, own, site)
            with on_local(once_anyway if taken else uses, work.axis):
                output = inner(*args, **kwargs)
            return change_first_output(output, summed, site)

        wrap(module, around)
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int):  # of the local table from here on
            module.padding_idx = padding - rows.start if padding in rows else None


SHARDERS = {nn.Linear: RowwiseLinear(), nn.Embedding: RowwiseTable(), nn.Module: RowwiseLeaf()}


def _check_gradient(sharder: Sharder, assignment: Assignment) -> None:
    """What is cut along the sequence has its part of the gradient, and all of that."""
    if assignment.style.gradient is not None and sharder.output_of(assignment.style) != Replicate():
        raise PlanError(
            f"rule {assignment.rule}: gradient is partial, and {assignment.shown} gives each rank its part "
            'of the sequence. Leave gradient out, or use output = "replicate".'
        )


def _gradient_summed(y: Tensor, assignment: Assignment, site: Site) -> Tensor:
    return y if assignment.style.gradient is None else gather_input(y, Replicate(), site)


def _own_rows(assignment: Assignment, work: Work) -> range:
    """The ids whose rows this rank has, of what is cut in rows."""
    for name, held in assignment.held.items():
        if isinstance(held.placement, Shard):
            axis, size = work.axis, assignment.module.get_parameter(name).shape[held.placement.dim]
            sizes = chunks.chunk_sizes(size, axis.size)
            first = sum(sizes[: axis.rank])
            return range(first, first + sizes[axis.rank])
    raise AssertionError("CutLeaf.check() refuses what is not cut")


def _refuse_whole_input(sharder: Sharder, assignment: Assignment) -> None:
    if sharder.input_of(assignment.style) == Replicate():
        refuse_below_gather_input(assignment, "Leave input out, and make the layer before it colwise.")


def _own_features(x: Tensor, before: Placement, site: Site) -> Tensor:
    if before != Replicate():
        return x
    origin = site.origin(Replicate(), Shard(-1))
    return collectives.split(x, -1, site.axis, grad_placement=Shard(-1), origin=origin)


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
