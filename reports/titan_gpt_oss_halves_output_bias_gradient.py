"""torchtitan 0.3.0: by its DTensor backends, the bias of gpt_oss' attention.wo gets 1/tp of its gradient.

ScaledBiasRowwiseLinear (models/common/linear.py) divides the bias by the tp degree, since the ranks' outputs
are summed afterwards. So each rank's gradient of it is the whole one divided by that degree, and they must be
summed. spmd_types does so (the bias is R); a replicated DTensor's gradient is taken to be whole on each rank,
and nothing sums it.

Run: python THIS.py (two processes, no GPU; the linear layer alone, in float64)
Expected: 1.000 times. Seen: 0.500 times (by partial_dtensor; full_dtensor runs the same code).
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims, parallel_dims, utils
from torchtitan.models.gpt_oss import model_registry

BACKEND = "partial_dtensor"


class Config:
    def __init__(self, tp: int) -> None:
        self.parallelism = ParallelismConfig(
            tensor_parallel_degree=tp, enable_sequence_parallel=False, spmd_backend=BACKEND
        )


def linear(tp: int) -> torch.nn.Module:
    utils.set_spmd_backend(BACKEND)
    config = model_registry("debugmodel", attn_backend="flex").model
    config.update_from_config(config=Config(tp))
    torch.manual_seed(0)
    layer: torch.nn.Module = config.layers[0].attention.wo.build()
    return layer.double()


def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    parallel_dims.device_type = "cpu"
    dims = ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, world_size=2, spmd_backend=BACKEND
    )
    dims.build_mesh()
    whole, sharded = linear(1), linear(2)
    x = torch.ones(2, 8, whole.in_features, dtype=torch.float64)
    whole(x).sum().backward()
    sharded.parallelize(dims)
    sharded(x.chunk(2, 2)[number]).sum().backward()  # each rank has its columns
    found = sharded.bias.grad.full_tensor() / whole.bias.grad
    if number == 0:
        print(f"the bias' gradient is {found.mean():.3f} times that of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (folder,), nprocs=2, start_method="spawn")
