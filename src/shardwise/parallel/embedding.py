"""The embedding styles of the native engine: how a sharded table turns ids into hidden states, and hidden gradients into its own.

Suffixes: B batch, S sequence, H hidden, T ranks of the axis (a block per destination or source), L the own part of S.
Under sequence parallelism every style leaves [B, S/T, H]; look-ups are made in the order of their destination, so that what goes over
the wire is contiguous already. Ids are the same on every rank of the axis; give them on the host where you can: then nothing waits for
the device to learn which rows are its own.

A gradient row is added to the table only where this rank owns the id and the id isn't padding_idx (F.embedding's rule).
"""

from dataclasses import dataclass
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.core.errors import InputError
from shardwise.core.placement import Partial, Placement, Replicate, Shard
from shardwise.core.plan import StyleName
from shardwise.parallel import collectives
from shardwise.parallel.axis import Site
from shardwise.parallel.ownership import RowOwnership, route
from shardwise.parallel.watch import show

NO_ROW = -1


@dataclass(frozen=True, slots=True)
class EmbeddingShard:
    """One sharded embedding: `sequence_parallel` says whether its output is Shard(1) or Replicate."""

    site: Site
    style: StyleName
    ownership: RowOwnership
    padding_idx: int | None
    sequence_parallel: bool

    def weight_placement(self) -> Placement:
        """Placement of the table."""
        match self.style:
            case StyleName.ROWWISE | StyleName.ROUTED:
                return Shard(0)
            case StyleName.COLWISE:
                return Shard(1)
            case _:
                return Replicate()

    def grad_placement(self) -> Placement:
        """What one rank's gradient of its table is: a part of the sum where it looked up a part of the tokens only."""
        placement = self.weight_placement()
        return Partial() if placement == Replicate() and self.sequence_parallel else placement

    def __call__(self, ids_BS: Tensor, weight: Tensor) -> Tensor:
        """ids [B, S] and the local table -> [B, S/T, H] under sequence parallelism, else [B, S, H]."""
        if ids_BS.dim() != 2:
            raise InputError(
                f"{self.site.module}: ids have shape {tuple(ids_BS.shape)}. Give [batch, sequence]."
            )
        n_ranks = self.site.axis.size
        if self.sequence_parallel and ids_BS.shape[1] % n_ranks:
            raise InputError(
                f"{self.site.module}: sequence {ids_BS.shape[1]} is no multiple of tp={n_ranks}, which sequence parallelism needs."
            )
        match self.style:
            case StyleName.ROWWISE:
                return self._rowwise(ids_BS, weight)
            case StyleName.COLWISE:
                return self._colwise(ids_BS, weight)
            case StyleName.ROUTED:
                return self._routed(ids_BS, weight)
            case StyleName.REPLICATED:
                return self._replicated(ids_BS, weight)
            case StyleName.GATHER_INPUT | StyleName.SEQUENCE_PARALLEL | StyleName.REPLICATE:
                raise AssertionError(f"{self.style} is no embedding style")
            case _:
                assert_never(self.style)

    def _rowwise(self, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis = self.site.axis
        if not self.sequence_parallel:
            own_BSH = self._look_up_own(weight, ids_BS)
            return collectives.all_reduce(
                own_BSH, axis, grad_placement=Replicate(), origin=self.site.origin(Partial(), Replicate())
            )
        own_TBLH = self._look_up_own(weight, _by_destination(ids_BS, axis.size))
        own_1BLH = collectives.reduce_scatter(
            own_TBLH, 0, axis, grad_placement=Shard(0), origin=self.site.origin(Partial(), Shard(1))
        )
        return own_1BLH.view(ids_BS.shape[0], -1, weight.shape[1])

    def _colwise(self, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis = self.site.axis
        if not self.sequence_parallel:
            slices_BSh = F.embedding(ids_BS.to(weight.device, non_blocking=True), weight, self.padding_idx)
            return collectives.all_gather(
                slices_BSh,
                2,
                axis,
                full_size=weight.shape[1] * axis.size,
                grad_placement=Replicate(),
                origin=self.site.origin(Shard(2), Replicate()),
            )
        ids_TBL = _by_destination(ids_BS, axis.size).to(weight.device, non_blocking=True)
        own_NH: Tensor = _LookUpSlices.apply(weight, ids_TBL.flatten(1), self.padding_idx, self.site)
        return own_NH.view(ids_BS.shape[0], -1, own_NH.shape[1])

    def _routed(self, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis, device = self.site.axis, weight.device
        plan = route(ids_BS.cpu(), self.ownership, axis.rank)
        show("send_rows", plan.send_rows)
        show("expand", plan.expand)
        send_rows = plan.send_rows.to(device, non_blocking=True)
        rows = F.embedding(send_rows, weight, self._padding_row())
        received = collectives.exchange_rows(
            rows,
            plan.send_splits,
            plan.receive_splits,
            axis,
            grad_placement=Shard(0),
            origin=self.site.origin(Shard(0), Shard(1)),
        )
        expand_BL = plan.expand.view(ids_BS.shape[0], -1).to(device, non_blocking=True)
        return F.embedding(expand_BL, received)

    def _replicated(self, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis = self.site.axis
        if self.sequence_parallel and axis.size > 1:
            ids_BS = ids_BS.chunk(axis.size, 1)[axis.rank]
        show("own_ids", ids_BS)
        return F.embedding(ids_BS.to(weight.device, non_blocking=True), weight, self.padding_idx)

    def _look_up_own(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Rows of the ids that this rank owns, zeros for the others."""
        rows = torch.where(
            self.ownership.owner(ids) == self.site.axis.rank, self.ownership.local(ids), NO_ROW
        )
        show("own_rows", rows)
        padding_row = self._padding_row()
        grad_rows = rows if padding_row is None else rows.masked_fill(rows == padding_row, NO_ROW)
        return _LookUpOwn.apply(weight, rows, grad_rows)  # type: ignore[no-any-return]

    def _padding_row(self) -> int | None:
        """padding_idx as a local row, if this rank owns it."""
        if self.padding_idx is None:
            return None
        padding = torch.tensor(self.padding_idx)
        return (
            int(self.ownership.local(padding))
            if int(self.ownership.owner(padding)) == self.site.axis.rank
            else None
        )


def _by_destination(ids_BS: Tensor, n_ranks: int) -> Tensor:
    """[B, S] -> [T, B, S/T]: block d is what rank d keeps."""
    return ids_BS.unflatten(1, (n_ranks, -1)).movedim(1, 0).contiguous()  # type: ignore[no-any-return]


class _LookUpOwn(torch.autograd.Function):
    """Rows of a table shard, zeros where `rows` is NO_ROW; no gradient goes to `grad_rows` that are NO_ROW."""

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


class _LookUpSlices(torch.autograd.Function):
    """Slices of rows for every rank, whole rows of the own tokens back: ids [T, N] and columns [V, h] -> [N, T x h].

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
            # added from where it lies: on a CPU fresh memory for both parts side by side would cost more than the adding
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
