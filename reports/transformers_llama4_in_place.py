"""transformers 5.23.0, 5.24.0: Llama4's mixture can't be trained under its own tp plan. Run: python THIS.py

The plan has shared_expert.down_proj "rowwise", whose output comes out of a custom autograd Function as a view
(DTensor.to_local). Llama4TextMoe.forward then adds what the experts gave in place, `out.add_(...)`, which
autograd refuses for such a view. `out = out + ...` would do.

Expected: a loss and gradients. Seen: RuntimeError in the forward.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

CONFIG = dict(vocab_size=128, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96)
CONFIG |= dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
CONFIG |= dict(num_local_experts=4, attention_chunk_size=8)


def mended(self: Llama4TextMoe, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its forward, but for the last sum."""
    x = x.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    routed = x.repeat(scores.shape[1], 1) * scores.transpose(0, 1).reshape(-1, 1)
    given = self.experts(routed)
    return self.shared_expert(x) + given.reshape(scores.shape[1], -1, given.shape[-1]).sum(dim=0), logits


def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    for what in ("its own forward", "a sum that isn't in place"):
        torch.manual_seed(0)
        settings, _, meshes = Llama4ForCausalLM.prepare_distribute_model(
            DistributedConfig(tp_size=2, tp_plan="auto")
        )
        model = Llama4ForCausalLM(Llama4TextConfig(**CONFIG))
        model = Llama4ForCausalLM.maybe_distribute_model(model, settings, meshes)
        ids = torch.randint(8, 128, (2, 16))
        try:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            told = "trains"
        except RuntimeError as error:
            told = f"raises {str(error)[:80]}..."
        if number == 0:
            print(f"{what}: {told}")
        Llama4TextMoe.forward = mended
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (folder,), nprocs=2, start_method="spawn")
