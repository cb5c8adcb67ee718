"""A gather that is still under way is waited for in a way that cuts it off from its past: nothing comes back.
It takes a batch of one sequence, of which a gather along the sequence needs no copy."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

from museum.parts import INNER, WIDTH, Small

ABOUT = {
    "number": 12,
    "title": "A pending gather is detached inside local_map, at batch 1",
    "sources": ["pytorch 2.13.0, torch/distributed/tensor/experimental/_func_map.py"],
    "symptom": "With one sequence on each rank the norm before the experts gets no gradient through them; "
    "with two it is right. No public report was found.",
    "axis": "tp",
    "mesh": "tp=2",
    "kind": "model",
    "wrong": "blocks.0.norm.weight",
    "reason": "nothing arrives",
    "before": "the gathered tokens go into local_map while the gather is under way",
    "after": "they are copied first, and the copy keeps their past",
    "batch": 1,
}


class Feed(nn.Module):
    """Between its norm and its layers the tokens are cut along the sequence, and gathered."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.into = nn.Parameter(torch.randn(WIDTH, INNER) / 4)
        self.back = nn.Parameter(torch.randn(INNER, WIDTH) / 5)
        self.copies = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)
        if self.mesh is None:
            return fed(x_BSD, self.into, self.back)
        whole, tp = [Replicate()], self.mesh["tp"]
        cut_BSD = DTensor.from_local(x_BSD, tp, whole, run_check=False).redistribute(placements=[Shard(1)])
        tokens_BSD = cut_BSD.redistribute(placements=whole, async_op=True)
        run = local_map(
            fed,
            out_placements=[Partial()],
            in_placements=(whole, [Shard(1)], [Shard(0)]),
            in_grad_placements=([Partial()], [Shard(1)], [Shard(0)]),
            device_mesh=tp,
        )
        out: DTensor = run(tokens_BSD.clone() if self.copies else tokens_BSD, self.into, self.back)
        return out.redistribute(placements=whole).to_local()


def fed(x_BSD: Tensor, into_DF: Tensor, back_FD: Tensor) -> Tensor:
    return (x_BSD @ into_DF).relu() @ back_FD


def build(mesh: DeviceMesh | None = None, fault: bool = True) -> nn.Module:
    block = Feed()
    model = Small(block)
    if mesh is not None:
        for name, dim in (("into", 1), ("back", 0)):
            whole = getattr(block, name).detach()
            shared = distribute_tensor(whole, mesh["tp"], [Shard(dim)], src_data_rank=None)
            setattr(block, name, nn.Parameter(shared))
        block.mesh, block.copies = mesh, not fault
    return model


def after(mesh: DeviceMesh | None = None) -> nn.Module:
    return build(mesh, fault=False)
