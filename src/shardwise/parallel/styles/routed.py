"""routed: each rank owns rows of the vocabulary, and sends each distinct row once to every rank whose part of
the sequence has the word. Which rows those are the token ids decide; see ownership.py. `ownership` says who
owns which."""

import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.core.placement import Shard
from shardwise.parallel import collectives
from shardwise.parallel.embedding import EmbeddingShard, TableSharder
from shardwise.parallel.ownership import route
from shardwise.parallel.sharder import Reasons
from shardwise.parallel.watch import show


class RoutedTable(TableSharder):
    cut_dim = 0
    decided_by_data = True
    reasons = Reasons(
        "Owners send each distinct row once to every rank whose part of the sequence has the word.",
        "What a rank received it sends back as gradient, so that owners can add up the gradients of their "
        "rows.",
    )

    def look_up(self, shard: EmbeddingShard, ids_BS: Tensor, weight: Tensor) -> Tensor:
        axis, device = shard.site.axis, weight.device
        plan = route(ids_BS.cpu(), shard.ownership, axis.rank)
        show("send_rows", plan.send_rows)
        show("expand", plan.expand)
        send_rows = plan.send_rows.to(device, non_blocking=True)
        rows = F.embedding(send_rows, weight, shard.padding_row())
        received = collectives.exchange_rows(
            rows,
            plan.send_splits,
            plan.receive_splits,
            axis,
            grad_placement=Shard(0),
            origin=shard.site.origin(Shard(0), Shard(1)),
        )
        expand_BL = plan.expand.view(ids_BS.shape[0], -1).to(device, non_blocking=True)
        return F.embedding(expand_BL, received)


SHARDERS = {nn.Embedding: RoutedTable()}
