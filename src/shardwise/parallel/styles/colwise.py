"""colwise: each rank has a part of what a weight gives.

embedding  own columns of the table: each rank looks up its slice of every token's row, in the order of their
           destination, and slices are swapped for whole rows of the own tokens; all-gathered where `output`
           is replicate
linear     own rows [out/T, in]. `input` replicate: its gradient is summed over the ranks; shard(1): gathered,
           its gradient reduce-scattered; below a gather_input it is taken as it is. `output` shard(-1): as
           computed; replicate: gathered; shard(1): each rank gets all features of its own tokens. The head's
           logits stay cut, for a loss that takes them so.
any other  as linear, by its own forward on what `parameters` says is cut; one that is a subclass of either is
           cut as they are. What gives rows by ids, as a scaled embedding does, is cut by columns

`pieces`: what a weight gives is several things laid one after the other, and each rank has its part of each.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from shardwise.core.errors import PlanError
from shardwise.core.held import Held
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.parallel import collectives, exchanges
from shardwise.parallel.axis import Site
from shardwise.parallel.counts import divide_counts
from shardwise.parallel.embedding import EmbeddingShard, TableSharder, by_destination
from shardwise.parallel.layers import (
    SEQUENCE_DIM,
    LinearSharder,
    gather_features,
    gather_input,
    in_own_order,
    local_or_none,
    refuse_uneven_sequence,
)
from shardwise.parallel.leaves import CutLeaf, hold_and_run_on_local, own_names
from shardwise.parallel.loss import VocabParallelLoss
from shardwise.parallel.own_forward import Change, change_first_output, change_first_tensor, wrap
from shardwise.parallel.ownership import PieceOrder, RowOwnership
from shardwise.parallel.parameters import local_weight, to_torch
from shardwise.parallel.sharder import Assignment, Fit, Reasons, Sharder, Work, divisors


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
    outputs = (Shard(-1), Replicate(), Shard(SEQUENCE_DIM))
    cut_dim = 0
    what = "rows"
    takes_tied_table = True

    def check_below_gather_input(self, assignment: Assignment) -> None:
        _refuse_to_gather_again(self, assignment)

    def held(self, assignment: Assignment) -> dict[str, Held]:
        return dict.fromkeys(own_names(assignment.module), Held(Shard(0), assignment.style.pieces))

    def apply(self, assignment: Assignment, work: Work) -> None:
        module, site = assignment.module, work.site(assignment)
        work.hold(assignment)
        divide_counts(assignment, work.axis.size)
        table = work.tables.get(id(module.weight))
        own_rows = _rows_of(assignment, table, work)
        before, after = _ways(self, assignment, site, work)

        def forward(x: Tensor) -> Tensor:
            return after(F.linear(before(x), own_rows(), local_or_none(module.bias, Shard(0))))

        module.forward = forward
        if self.output_of(assignment.style) == Shard(-1) and assignment.module is work.head:
            is_cut_by_rows = table is not None and table.weight_placement == Shard(0)
            own = table.ownership if table is not None and is_cut_by_rows else None
            work.loss = VocabParallelLoss(site, own or RowOwnership(module.out_features, work.axis.size))

    def twin(self, assignment: Assignment, *, keeps_dtensor: bool) -> ParallelStyle:
        before, after = self.input_of(assignment.style), self.output_of(assignment.style)
        return ColwiseParallel(
            input_layouts=to_torch(before), output_layouts=to_torch(after), use_local_output=not keeps_dtensor
        )


class ColwiseLeaf(CutLeaf):
    """By the module's own forward."""

    inputs = ColwiseLinear.inputs
    outputs = ColwiseLinear.outputs
    takes_tied_table = True
    by_class: ClassVar = {
        nn.Linear: dict.fromkeys(("weight", "bias"), Held(Shard(0))),
        nn.Embedding: {"weight": Held(Shard(1))},
    }

    def check(self, assignment: Assignment, fit: Fit) -> None:
        super().check(assignment, fit)
        has_shared = any(held.parts for held in assignment.held.values())
        if has_shared and self.output_of(assignment.style) != Shard(-1):
            raise PlanError(
                f"rule {assignment.rule}: ranks use the same parts of {assignment.shown}, which can't be "
                "gathered. Leave output out."
            )

    def check_below_gather_input(self, assignment: Assignment) -> None:
        _refuse_to_gather_again(self, assignment)

    def apply(self, assignment: Assignment, work: Work) -> None:
        hold_and_run_on_local(assignment, work)
        site = work.site(assignment)
        before, after = _ways(self, assignment, site, work)

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = change_first_tensor(args, kwargs, before, site)
            return change_first_output(inner(*args, **kwargs), after, site)

        wrap(assignment.module, around)
        if self.output_of(assignment.style) == Shard(-1) and assignment.module is work.head:
            work.loss = VocabParallelLoss(site, RowOwnership(_features(assignment), work.axis.size))


SHARDERS = {nn.Linear: ColwiseLinear(), nn.Embedding: ColwiseTable(), nn.Module: ColwiseLeaf()}


def _refuse_to_gather_again(sharder: Sharder, assignment: Assignment) -> None:
    if sharder.input_of(assignment.style) == Shard(SEQUENCE_DIM):
        raise PlanError(
            f"rule {assignment.rule}: input is shard(1), but a gather_input above {assignment.name} has "
            "made it whole. Leave input out."
        )


def _features(assignment: Assignment) -> int:
    """How many features all ranks give together: what the first parameter that is cut has of them."""
    for name, held in assignment.held.items():
        if isinstance(held.placement, Shard):
            return int(assignment.module.get_parameter(name).shape[held.placement.dim])
    raise AssertionError("CutLeaf.check() refuses what is not cut")


def _ways(sharder: Sharder, assignment: Assignment, site: Site, work: Work) -> tuple[Change, Change]:
    """What is done to the input, and to what comes out. Ids have no gradient, and are the same everywhere."""
    before = None if assignment.is_input_whole else sharder.input_of(assignment.style)
    after, features = sharder.output_of(assignment.style), _features(assignment)
    pieces = next((held.pieces for held in assignment.held.values() if held.pieces), ())
    order = PieceOrder(pieces, work.axis.size) if pieces and work.axis.size > 1 else None
    # below a gather_input whatever is whole has a part of its gradient on each rank
    grad: Placement = Partial() if assignment.is_input_whole else Replicate()

    def into(x: Tensor) -> Tensor:
        return x if before is None or not x.is_floating_point() else gather_input(x, before, site)

    def out(y: Tensor) -> Tensor:
        if after == Shard(-1):
            return y
        if after == Replicate():
            return gather_features(y, features, order, site, grad)
        refuse_uneven_sequence(y, site)
        origin = site.origin(Shard(-1), after)
        whole = collectives.all_to_all(
            y, SEQUENCE_DIM, -1, site.axis, full_size=features, grad_placement=after, origin=origin
        )
        return in_own_order(whole, order)

    return into, out


def _rows_of(assignment: Assignment, table: EmbeddingShard | None, work: Work) -> Callable[[], Tensor]:
    """How a linear layer gets its own rows of its weight: they are there, or the table that it is tied to has
    them."""
    module = assignment.module
    if table is None:
        return lambda: local_weight(module.weight, Shard(0))
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
            received = exchanges.swap_others_now(slices, axis, site.origin(Shard(2), Shard(1)))
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
            received = exchanges.swap_others_now(slices, site.axis, site.origin(Shard(1), Shard(2)))
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
