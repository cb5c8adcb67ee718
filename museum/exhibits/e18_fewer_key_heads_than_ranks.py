"""One head of keys is cut over two ranks: less than a head is left, and a view in the forward fails."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, WIDTH, Column, Enter, Row, Small, attended, heads_of, shard

ABOUT = {
    "number": 18,
    "title": "Fewer key heads than ranks: the forward fails",
    "sources": ["huggingface/transformers#48307", "pytorch/torchtitan#2577"],
    "symptom": "Sharding succeeds, and then a view in attention raises; nothing warned before.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0",
    "reason": "crashes",
    "before": "k and v are cut along their features, a half head for each rank",
    "after": "k and v stay whole, and their gradients are summed",
}


class OneKeyHead(nn.Module):
    whole = False

    def __init__(self, whole: bool) -> None:
        super().__init__()
        kind = nn.Linear if whole else Column
        self.q = Column(WIDTH, HEADS * HEAD, bias=False)
        self.k, self.v = (kind(WIDTH, HEAD, bias=False) for _ in range(2))
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BNSH, keys = heads_of(self.q(x_BSD)), [self.k(x_BSD), self.v(x_BSD)]
        if self.q.group is not None and not isinstance(self.k, Column):
            keys = [Enter.apply(each, self.q.group) for each in keys]
        k_BNSH, v_BNSH = (heads_of(each).expand_as(q_BNSH) for each in keys)
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    model = Small(OneKeyHead(whole=not fault))
    if mesh is not None:
        shard(model, mesh)
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
