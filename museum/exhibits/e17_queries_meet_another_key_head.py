"""Fewer key heads than they would need to be cut: keys and values stay whole, and each rank spreads all of
them over its own query heads."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, WIDTH, Column, Enter, Row, Small, attended, heads_of, shard

ABOUT = {
    "number": 17,
    "title": "Whole key heads under cut query heads: queries meet another group's keys",
    "sources": ["huggingface/transformers#47811", "ISEEKYAN/Megatron-LM#91"],
    "symptom": "Nothing raises; queries attend to keys of another group than without tensor parallelism.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0",
    "reason": "whole key heads",
    "before": "a rank repeats both key heads over its two query heads, which belong to one of them",
    "after": "a rank takes the key head that its query heads belong to",
}
GROUPS = 2


class Grouped(nn.Module):
    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q = Column(WIDTH, HEADS * HEAD, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * HEAD, bias=False) for _ in range(2))
        self.o = Row(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BNSH, keys = heads_of(self.q(x_BSD)), [self.k(x_BSD), self.v(x_BSD)]
        if self.mesh is not None:
            group = self.mesh.get_group("tp")
            own = slice(group.rank(), group.rank() + 1)
            k_BNSH, v_BNSH = (heads_of(Enter.apply(each, group))[:, own] for each in keys)
        else:
            k_BNSH, v_BNSH = map(heads_of, keys)
        times = q_BNSH.shape[1] // k_BNSH.shape[1]
        k_BNSH, v_BNSH = (each.repeat_interleave(times, 1) for each in (k_BNSH, v_BNSH))
        out: Tensor = self.o(attended(q_BNSH, k_BNSH, v_BNSH))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Grouped()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        if not fault:
            block.mesh = mesh
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
