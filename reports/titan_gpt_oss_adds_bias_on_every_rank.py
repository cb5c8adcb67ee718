"""torchtitan 0.3.0: by its default backend, gpt_oss adds an expert's output bias once on every tp rank.

GptOssGroupedExperts divides mlp2_bias by the tp degree, since the ranks' outputs are summed afterwards. It
reads that degree off the mesh of mlp1_weight_EGD (models/gpt_oss/moe.py: `isinstance(..., DTensor)`). Under
spmd_types parameters are plain tensors, the degree stays 1, and the sum over tp has the bias tp times. Its
types can't see it: the degree is a number.

Run: python THIS.py (two processes, no GPU; the mixture of one layer in bfloat16, which it is written for)
Expected: 0 off up to rounding, with a bias and without. Seen: bias 0.5: 0.992 off, +0.500 on average.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims, parallel_dims, utils
from torchtitan.models.gpt_oss import model_registry


class Config:
    def __init__(self, tp: int) -> None:
        self.parallelism = ParallelismConfig(tensor_parallel_degree=tp, enable_sequence_parallel=False)


def mixture(tp: int, bias: float) -> torch.nn.Module:
    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:1]
    config.update_from_config(config=Config(tp))
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    torch.nn.init.constant_(model.layers["0"].moe.routed_experts.inner_experts.mlp2_bias_ED, bias)
    return model.layers["0"].moe


@torch.no_grad()
def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    parallel_dims.device_type = "cpu"
    torch.set_default_dtype(torch.bfloat16)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, world_size=2)
    dims.build_mesh()
    x = torch.randn(2, 8, mixture(1, 0.0).router.gate.in_features, generator=torch.Generator().manual_seed(1))
    for bias in (0.0, 0.5):
        expected = mixture(1, bias)(x)
        sharded = mixture(2, bias)
        sharded.parallelize(dims)
        with utils.get_spmd_context(parallel_dims=dims)():
            found = sharded(x)
        if number == 0:
            more = found - expected
            print(f"bias {bias}: {more.norm() / expected.norm():.3f} off, {more.mean():+.3f} on average")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (folder,), nprocs=2, start_method="spawn")
