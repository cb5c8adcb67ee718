"""Norms of each head's queries and keys stand after layers that are cut by heads: a rank's gradient is that
of its own heads."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from museum.parts import HEAD, Attention, Small, attended, heads_of, shard, sums_in_backward

ABOUT = {
    "number": 5,
    "title": "Query and key norms: each rank has its heads' part of the gradient",
    "sources": ["NVIDIA-NeMo/RL#3716", "huggingface/transformers#44668"],
    "symptom": "Replicated norms of queries and keys get another gradient on each tensor-parallel rank.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.q_norm.weight",
    "reason": "parts not summed",
    "before": "the training step skips the all-reduce of replicated parameters",
    "after": "gradients of q_norm and k_norm are all-reduced over tp",
}


class Normed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        q_BNSH, k_BNSH, v_BNSH = (heads_of(layer(x_BSD)) for layer in (self.q, self.k, self.v))
        out: Tensor = self.o(attended(self.q_norm(q_BNSH), self.k_norm(k_BNSH), v_BNSH))
        return out


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Normed()
    model = Small(block)
    if mesh is not None:
        shard(model, mesh)
        if not fault:
            for norm in (block.q_norm, block.k_norm):
                sums_in_backward(norm.weight, mesh.get_group("tp"))
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
