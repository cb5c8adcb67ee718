"""Records a few steps on this rank with torch.profiler, so that `shardwise diff` can say where their time
went: one file a rank.

Steps are marked `ProfilerStep#N`, modules are ranges `module: NAME` in the forward, and our own collectives
are ranges with the module that asked and why (parallel/issuing.py). gloo marks its own; NCCL's are
kernels with PyTorch's metadata.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from shardwise.core.errors import RunError

WARM_UP = 1
"""Steps that run under the profiler unmarked: its first one allocates buffers and is slow."""


class StepRecorder:
    """`with recorder.step(): ...` around each step; the first WARM_UP of them are left unmarked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step. Waits for the device before it and after it, so that a step's work lies within its
        mark."""
        number = self._seen - WARM_UP
        self._seen += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        with record_function(f"ProfilerStep#{number}" if number >= 0 else "warm-up"):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)


@contextmanager
def record_profile(folder: str | Path, model: nn.Module | None = None) -> Iterator[StepRecorder]:
    """Writes `folder`/rankN.json.gz when it ends. All ranks call it; model: whose modules are to be marked.

        with shardwise.record_profile("traces/mine", model) as recorder:
            for batch in first_four_batches:
                with recorder.step():
                    train_step(batch)

    Raises RunError where the file can't be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    uses_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if uses_cuda else torch.device("cpu")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_cuda else [])]
    path = Path(folder) / f"rank{rank}.json.gz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            profiler = stack.enter_context(
                profile(activities=activities, record_shapes=True, acc_events=True)
            )
            if model is not None:
                stack.enter_context(_marked(model))
            yield StepRecorder(device)
        profiler.export_chrome_trace(str(path))
    except OSError as error:
        raise RunError(
            f"can't write {path}: {error.strerror or error}. Free space there, or choose another folder."
        ) from None


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Each module's forward as a range. A forward that raises leaves its range open until the end."""
    with ExitStack() as hooks:
        open_ranges: list[Any] = []
        hooks.callback(lambda: [mark.__exit__(None, None, None) for mark in reversed(open_ranges)])

        def enter(_: nn.Module, __: Any, *, name: str) -> None:
            mark = record_function(f"module: {name}")
            mark.__enter__()
            open_ranges.append(mark)

        def leave(*_: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_pre_hook(partial(enter, name=name)))
                hooks.enter_context(module.register_forward_hook(leave))
        yield
