"""Lightning's ModelParallelStrategy with a plan, as docs/frameworks.md has it. It starts its other
rank itself. Prints both runs' losses."""

import json
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

import shardwise
from tests.frameworks.recipe_model import MAX_NORM, PLAN, batches, built, losses_of_one_process


class Training(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = built(), list[float]()

    def configure_model(self) -> None:
        if not isinstance(self.model.norm.weight, torch.distributed.tensor.DTensor):
            plan = shardwise.Plan.from_toml(PLAN)
            shardwise.parallelize(self.model, plan, self.device_mesh["tensor_parallel"])

    def training_step(self, batch: Any) -> Tensor:
        ids, labels = batch
        loss = shardwise.loss_of(self.model)(self.model(ids), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    training = Training()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, gradient_clip_val=MAX_NORM, logger=False,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
        enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    dataset: Any = batches()
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=None)
    trainer.fit(training, loader)
    if trainer.is_global_zero:
        print("LOSSES", json.dumps([training.losses, losses_of_one_process()]), flush=True)


if __name__ == "__main__":
    main()
