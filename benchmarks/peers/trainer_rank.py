"""A rank of transformers' own Trainer on a CPU, over a model that transformers itself has cut by its TP plan
(`from_pretrained(tp_plan="auto")`).

Shim: accelerate's check that a ParallelismConfig runs on accelerators alone.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

ParallelismConfig._validate_accelerator = lambda self, accelerator: None


class Text(Dataset):  # type: ignore[type-arg]
    """Windows of a file's tokens in order; the model makes the next tokens of them itself."""

    def __init__(self, path: str, seq: int) -> None:
        self._tokens, self._seq = np.load(path, mmap_mode="r"), seq

    def __len__(self) -> int:
        return len(self._tokens) // self._seq

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = index * self._seq
        window = torch.from_numpy(self._tokens[first : first + self._seq].astype(np.int64))
        return {"input_ids": window, "labels": window}


class Clock(TrainerCallback):
    """Notes when each step ended, and its loss."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.ends_s.append(time.time())

    def on_log(self, *args: Any, **more: Any) -> None:
        if "loss" in more["logs"]:
            self.losses.append(float(more["logs"]["loss"]))


def main() -> None:
    asked = json.loads(sys.argv[1])
    if asked["makes_weights"]:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked["weights"])).save_pretrained(
            asked["weights"]
        )
        return
    model = AutoModelForCausalLM.from_pretrained(asked["weights"], tp_plan="auto", dtype=torch.float32)
    clock = Clock()
    beta1, beta2 = asked["betas"]
    arguments = TrainingArguments(
        output_dir=asked["out"],
        per_device_train_batch_size=asked["batch"],
        max_steps=asked["steps"],
        learning_rate=asked["learning_rate"],
        warmup_steps=asked["warm_up"],
        weight_decay=asked["weight_decay"],
        adam_beta1=beta1,
        adam_beta2=beta2,
        max_grad_norm=asked["max_norm"],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    text = Text(asked["tokens"], asked["seq"])
    Trainer(model=model, args=arguments, train_dataset=text, callbacks=[clock]).train()
    if dist.get_rank() == 0:
        parameters = sum(each.numel() for each in model.parameters())
        print(
            json.dumps({"ends_s": clock.ends_s, "losses": clock.losses, "parameters": parameters}), flush=True
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
