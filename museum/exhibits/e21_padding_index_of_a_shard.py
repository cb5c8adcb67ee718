"""A table cut by vocabulary keeps the padding index of the whole, which is another row in each shard: that
row gets no gradient."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import VOCAB, WIDTH, Leave, Mlp, Small, cut, local, shard

ABOUT = {
    "number": 21,
    "title": "A global padding index silences rows of other shards",
    "sources": ["pytorch/torchtitan#4637"],
    "symptom": "Some rows of the embedding on other ranks never learn; a large index raises instead.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "table.weight",
    "reason": "nothing arrives",
    "before": "every shard's look-up is given the whole table's padding index",
    "after": "the index is moved into the shard that has the row, and no other has one",
}
PADDING = 3


class Table(nn.Embedding):
    """Rows are cut over the ranks of `group`."""

    group: ProcessGroup | None = None
    moves = False

    def forward(self, ids_BS: Tensor) -> Tensor:
        if self.group is None:
            return super().forward(ids_BS)
        weight_VD = local(self.weight)
        own_BS = ids_BS - self.group.rank() * len(weight_VD)
        is_other_BS = (own_BS < 0) | (own_BS >= len(weight_VD))
        padding: int | None = PADDING
        if self.moves:
            padding = PADDING if self.group.rank() == 0 else None
        rows_BSD = F.embedding(own_BS.masked_fill(is_other_BS, 0), weight_VD, padding_idx=padding)
        out: Tensor = Leave.apply(rows_BSD.masked_fill(is_other_BS.unsqueeze(-1), 0), self.group)
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Mlp())
    model.table = table = Table(VOCAB, WIDTH, padding_idx=PADDING)
    if mesh is not None:
        shard(model, mesh)
        cut(table, "weight", mesh["tp"], 0)
        table.group, table.moves = mesh.get_group("tp"), not fault
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
