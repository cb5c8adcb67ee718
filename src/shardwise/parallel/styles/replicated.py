"""replicated: each rank has the whole table and looks up its own part of the sequence; the table's gradient
is summed. A table of another class does so by its own forward."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.placement import Partial
from shardwise.core.plan import Style
from shardwise.parallel.embedding import EmbeddingShard, TableSharder
from shardwise.parallel.layers import refuse_uneven_sequence
from shardwise.parallel.leaves import WholeLeaf
from shardwise.parallel.own_forward import change_first_tensor, wrap
from shardwise.parallel.sharder import Assignment, Work
from shardwise.parallel.watch import show


class ReplicatedTable(TableSharder):
    def look_up(self, shard: EmbeddingShard, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis = shard.site.axis
        if shard.sequence_parallel and axis.size > 1:
            ids_BS = ids_BS.chunk(axis.size, 1)[axis.rank]
        show("own_ids", ids_BS)
        return F.embedding(ids_BS.to(weight.device, non_blocking=True), weight, shard.padding_idx)


class ReplicatedLeaf(WholeLeaf):
    """By the module's own forward."""

    outputs = ReplicatedTable.outputs

    def gradient(self, style: Style) -> Partial | None:
        return Partial() if self.cuts_sequence(style) else None

    def apply(self, assignment: Assignment, work: Work) -> None:
        super().apply(assignment, work)
        site, size = work.site(assignment), work.axis.size
        if not self.cuts_sequence(assignment.style) or size == 1:
            return

        def own(ids_BS: Tensor) -> Tensor:
            refuse_uneven_sequence(ids_BS, site)
            return ids_BS.chunk(size, 1)[work.axis.rank]

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = change_first_tensor(args, kwargs, own, site)
            return inner(*args, **kwargs)

        wrap(assignment.module, around)


SHARDERS = {nn.Embedding: ReplicatedTable(), nn.Module: ReplicatedLeaf()}
