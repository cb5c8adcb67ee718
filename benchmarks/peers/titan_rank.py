"""A rank of torchtitan 0.2.2's own Trainer, on a CPU: its Llama 3 in the sizes asked for, its TP plan with
sequence and loss parallelism, its optimizer and its loop.

Shims, for it knows GPUs alone: which device there is; what it asks a device about memory; barriers that name
one.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

torch._utils._get_available_device_type = lambda: "cpu"
for _name, _answer in (
    ("get_device_name", "cpu"),
    ("get_device_properties", SimpleNamespace(total_memory=1 << 34)),
    ("memory_stats", {}),
    ("reset_peak_memory_stats", None),
    ("empty_cache", None),
):
    setattr(torch.cpu, _name, lambda *_, answer=_answer: answer)
_barrier = dist.barrier
dist.barrier = lambda *args, device_ids=None, **more: _barrier(*args, **more)

import torchtitan.train as titan  # noqa: E402
from torch.utils.data import IterableDataset  # noqa: E402
from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec  # noqa: E402
from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402

NAME = "peer"


class Text(IterableDataset):  # type: ignore[type-arg]
    """Windows of a file's tokens in order, each with its next tokens."""

    def __init__(self, path: str, seq: int) -> None:
        self._tokens, self._seq = np.load(path, mmap_mode="r"), seq

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for first in range(0, len(self._tokens) - self._seq, self._seq):
            window = torch.from_numpy(self._tokens[first : first + self._seq + 1].astype(np.int64))
            yield {"input": window[:-1]}, window[1:]


class Timed(titan.Trainer):
    """Notes when each step ended, and its loss."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.ends_s: list[float] = []
        self.losses: list[float] = []
        log = self.metrics_processor.log

        def noted(step: int, mean_loss: float, *args: Any, **more: Any) -> None:
            self.losses.append(mean_loss)
            log(step, mean_loss, *args, **more)

        self.metrics_processor.log = noted

    def train_step(self, data_iterator: Any) -> None:
        super().train_step(data_iterator)
        self.ends_s.append(time.time())


def main() -> None:
    asked = json.loads(sys.argv[1])

    def loader(dp_world_size: int, dp_rank: int, tokenizer: object, job_config: Any) -> Any:
        text = Text(asked["tokens"], asked["seq"])
        return ParallelAwareDataloader(
            text, dp_rank=dp_rank, dp_world_size=dp_world_size, batch_size=asked["batch"]
        )

    sizes = TransformerModelArgs(
        dim=asked["hidden"],
        n_layers=asked["layers"],
        n_heads=asked["heads"],
        n_kv_heads=asked["kv_heads"],
        vocab_size=asked["vocab"],
        rope_theta=asked["rope_theta"],
        multiple_of=asked["ffn_multiple_of"],
    )
    spec = replace(
        get_train_spec(), model_args={NAME: sizes}, build_tokenizer_fn=None, build_dataloader_fn=loader
    )
    register_train_spec(NAME, spec)
    config = JobConfig()
    config.model.name = config.model.flavor = NAME
    config.job.dump_folder = asked["out"]
    config.training.local_batch_size, config.training.seq_len = asked["batch"], asked["seq"]
    config.training.steps, config.training.max_norm = asked["steps"], asked["max_norm"]
    config.training.mixed_precision_param = "float32"
    config.parallelism.tensor_parallel_degree = int(os.environ["WORLD_SIZE"])
    config.activation_checkpoint.mode = "none"
    config.optimizer.lr, config.optimizer.weight_decay = asked["learning_rate"], asked["weight_decay"]
    config.optimizer.beta1, config.optimizer.beta2 = asked["betas"]
    config.lr_scheduler.warmup_steps = asked["warm_up"]
    config.metrics.log_freq = 1
    trainer = Timed(config)
    trainer.train()
    if dist.get_rank() == 0:
        parameters = sum(each.numel() for each in trainer.model_parts[0].parameters())
        print(
            json.dumps({"ends_s": trainer.ends_s, "losses": trainer.losses, "parameters": parameters}),
            flush=True,
        )
    trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
