"""transformers 5.23.0, 5.24.0: Apertus' learned activation gets half of its gradient. Run: python THIS.py

act_fn.alpha_p and alpha_n are whole on every rank and work on its part of the hidden units (up_proj is
colwise), so each rank's gradient is a summand. base_model_tp_plan has no rule for act_fn, and nothing sums.
Nothing is told: ranks' alphas drift apart, and the loss looks normal. "replicated_with_grad_allreduce", which
the plan has for q_norm and k_norm already, would do it. apertus1p5_text (5.24) is the same.

Expected: the gradients of one process. Seen: alpha_p and alpha_n far off on rank 0.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import ApertusConfig, ApertusForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

CONFIG = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
CONFIG |= dict(num_attention_heads=4, num_key_value_heads=4)
MENDED = {"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    model = ApertusForCausalLM(ApertusConfig(**CONFIG)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(8, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}
    return {name: each for name, each in whole.items() if each.any()}


def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    whole = gradients(build())
    for what, plan in (("its own plan", "auto"), ("the plan mended", MENDED)):
        settings = DistributedConfig(tp_size=2, tp_plan=plan)
        settings, _, meshes = ApertusForCausalLM.prepare_distribute_model(settings)
        found = gradients(ApertusForCausalLM.maybe_distribute_model(build(), settings, meshes))
        off = {name: float((found[name] - each).norm() / each.norm()) for name, each in whole.items()}
        if number == 0:
            wrong = {name: f"{value:.0%} off" for name, value in off.items() if value > 1e-6}
            print(f"{what}: {wrong or 'all gradients are right'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (folder,), nprocs=2, start_method="spawn")
