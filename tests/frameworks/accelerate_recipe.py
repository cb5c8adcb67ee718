"""accelerate with a plan, as docs/frameworks.md has it for a CPU, where it would wrap a model in DDP: only
the optimizer is prepared. Under torchrun. Prints both runs' losses."""

import json

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

import shardwise
from tests.frameworks.recipe_model import MAX_NORM, PLAN, batches, built, losses_of_one_process


def main() -> None:
    accelerator = Accelerator(cpu=True)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = shardwise.parallelize(built(), shardwise.Plan.from_toml(PLAN), mesh)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for ids, labels in batches():
        loss = shardwise.loss_of(model)(model(ids), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    if accelerator.is_main_process:
        print("LOSSES", json.dumps([losses, losses_of_one_process()]), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
