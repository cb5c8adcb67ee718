"""Multi-query attention: queries are cut by heads, the one head of keys and values is whole on every rank,
and gets the gradient of that rank's queries."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, WIDTH, Column, Enter, Row, Small, attended, heads_of, shard

ABOUT = {
    "number": 16,
    "title": "Multi-query attention: keys and values get a part of their gradient",
    "sources": ["bigcode-project/Megatron-LM#37", "bigcode-project/Megatron-LM#11"],
    "symptom": "Validation loss 3.74 with tensor parallelism where 2.64 is right.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.kv.weight",
    "reason": "parts not summed",
    "before": "each rank's queries give their own gradient to the replicated keys and values",
    "after": "the gradient of the keys and values is all-reduced over the ranks",
}


class OneKeyHead(nn.Module):
    group: ProcessGroup | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q = Column(WIDTH, HEADS * HEAD, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * HEAD, bias=False)
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BNSH, kv_BSF = heads_of(self.q(x_BSD)), self.kv(x_BSD)
        if self.group is not None:
            kv_BSF = Enter.apply(kv_BSF, self.group)
        k_BNSH, v_BNSH = (each.expand_as(q_BNSH) for each in heads_of(kv_BSF, 2 * HEAD).chunk(2, -1))
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = OneKeyHead()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        if not fault:
            block.group = mesh.get_group("tp")
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
