"""transformers 5.23.0, 5.24.0: Inkling2's experts compute something else under tp. Run: python THIS.py

experts.gate_up_proj holds two weights, gate and up, one after the other, and is cut by "colwise" as if it
were one: rank 0 gets all of gate, rank 1 all of up, and each takes its half for both. Mixtral's plan, of the
same experts, has "packed_colwise", which cuts each by itself. inkling2_loop has the same rule.

Expected: the gradients of one process. Seen: every gradient is wrong, since the outputs are.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import Inkling2ForCausalLM, Inkling2TextConfig
from transformers.distributed.configuration_utils import DistributedConfig

CONFIG = dict(vocab_size=128, unpadded_vocab_size=128, hidden_size=64, moe_intermediate_size=96)
CONFIG |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, d_rel=16)
CONFIG |= dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, sliding_window_size=8)
CONFIG |= dict(rel_extent=16, n_routed_experts=4, num_experts_per_tok=2, eos_token_id=127)
CONFIG |= dict(layer_types=["hybrid_sliding", "hybrid"])
MENDED = {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"}


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Inkling2ForCausalLM(Inkling2TextConfig(**CONFIG))
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
        settings, _, meshes = Inkling2ForCausalLM.prepare_distribute_model(settings)
        found = gradients(Inkling2ForCausalLM.maybe_distribute_model(build(), settings, meshes))
        off = {name: float((found[name] - each).norm() / each.norm()) for name, each in whole.items()}
        if number == 0:
            wrong = {name: f"{value:.0%} off" for name, value in off.items() if value > 1e-3}
            print(f"{what}: {wrong or 'all gradients are right'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank, (folder,), nprocs=2, start_method="spawn")
