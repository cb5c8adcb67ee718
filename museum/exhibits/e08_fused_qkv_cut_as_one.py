"""Queries, keys and values lie one after the other in one weight, which is cut as if it were one."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, WIDTH, Column, Row, Small, attended, heads_of, shard

ABOUT = {
    "number": 8,
    "title": "A fused QKV weight is cut as one",
    "sources": ["NVIDIA-NeMo/Automodel#1324", "awslabs/slapo#46", "deepspeedai/DeepSpeed#3844"],
    "symptom": "Ranks get all queries and some keys, or keys and values, and take them for thirds; silently "
    "wrong.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.qkv.weight",
    "reason": "cut as one",
    "before": "rows are [all q | all k | all v], and rank r has the r-th chunk of them",
    "after": "rows are [q k v of head 0 | q k v of head 1 | ...]: a chunk is whole heads",
}


class Fused(nn.Module):
    """by_head: how the rows of qkv are ordered."""

    def __init__(self, by_head: bool) -> None:
        super().__init__()
        self.qkv = Column(WIDTH, 3 * HEADS * HEAD, bias=False)
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)
        self.by_head = by_head

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv_BSF = self.qkv(x_BSD)
        if self.by_head:
            q_BNSH, k_BNSH, v_BNSH = heads_of(qkv_BSF, 3 * HEAD).chunk(3, -1)
        else:
            q_BNSH, k_BNSH, v_BNSH = (heads_of(each) for each in qkv_BSF.chunk(3, -1))
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(Fused(by_head=not fault))
    if mesh is not None:
        shard(model, mesh)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
