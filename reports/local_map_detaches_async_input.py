"""torch 2.13.0: local_map loses the gradient of an input whose all-gather is under way. Run: python THIS.py

A redistribute with async_op=True gives a DTensor around an AsyncCollectiveTensor. Autograd's history is on
that wrapper. local_map (torch/distributed/tensor/experimental/_func_map.py, line 228) calls its wait(), which
gives the tensor inside: it has no history, and the backward ends there, without an error.

Which batch is hit: gathering dim 1 of [batch, seq, hidden] needs a copy, before which the gather is waited
for, unless the dims before are 1. So batch 2 is right and batch 1 is wrong. torchtitan 0.3.0 comes this way
with its DTensor backends and sequence parallelism: in every MoE layer (qwen3, deepseek_v3) all gradients
before the experts lack what comes back through them, and the loss looks normal.

Expected: the gradient of x is 2 x everywhere. Seen at batch 1: none.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map


def gradient(batch: int, mesh: dist.DeviceMesh) -> str:
    x = distribute_tensor(torch.ones(batch, 8, 4), mesh, [Shard(1)]).requires_grad_()
    whole = x.redistribute(mesh, [Replicate()], async_op=True)
    squared = local_map(
        lambda t: t * t / mesh.size(),
        out_placements=[Partial()],
        in_placements=([Replicate()],),
        in_grad_placements=([Partial()],),
        device_mesh=mesh,
    )(whole)
    if not squared.requires_grad:
        return "lost: the output requires no gradient"
    squared.sum().backward()
    return "right" if torch.equal(x.grad.full_tensor(), torch.full((batch, 8, 4), 2.0)) else "wrong"


def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    before = {batch: gradient(batch, mesh) for batch in (2, 1)}
    # a copy is an op that autograd sees: it waits, and keeps the history
    AsyncCollectiveTensor.wait = lambda self: self.clone()
    mended = gradient(1, mesh)
    if number == 0:
        for batch, told in before.items():
            print(f"batch {batch}: {told}")
        print(f"batch 1, where local_map waits by an op that autograd sees: {mended}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (folder,), nprocs=2, start_method="spawn")
