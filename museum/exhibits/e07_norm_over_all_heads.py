"""A norm over the full width of all queries: under tensor parallelism each rank takes the mean square of its
own heads only."""

import torch
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, HEADS, Attention, Small, attended, cut, heads_of, local, shard

ABOUT = {
    "number": 7,
    "title": "A norm over all heads takes its statistics over a rank's heads",
    "sources": ["allenai/OLMo#877", "huggingface/transformers#44668", "EleutherAI/gpt-neox#1424"],
    "symptom": "Outputs depend on the number of tensor-parallel ranks; nothing raises.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.q_norm",
    "reason": "statistics over a part",
    "before": "the weight is cut with the heads, and the mean square is that of the part",
    "after": "the mean square is averaged over the ranks",
}


class Wide(nn.Module):
    """RMSNorm over HEADS * HEAD features."""

    group: ProcessGroup | None = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEADS * HEAD))

    def forward(self, x_BSF: Tensor) -> Tensor:
        square = x_BSF.square().mean(-1, keepdim=True)
        if self.group is not None:
            square = dist_functional.all_reduce(square, group=self.group) / self.group.size()
        return x_BSF * (square + 1e-6).rsqrt() * local(self.weight)


class Normed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm = Wide()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        q_BNSH = heads_of(self.q_norm(self.q(x_BSD)))
        out: Tensor = self.o(attended(q_BNSH, heads_of(self.k(x_BSD)), heads_of(self.v(x_BSD))))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Normed()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        cut(block.q_norm, "weight", mesh["tp"], 0)
        if not fault:
            block.q_norm.group = mesh.get_group("tp")
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
