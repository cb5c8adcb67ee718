"""One rank's memory: exact sizes of what it keeps, and the peak around a step.

On CUDA: active and reserved bytes of torch.cuda.memory_stats. On a CPU: the resident set (VmRSS, VmHWM of
/proc/self/status), whose peak is reset before the step; what freed blocks an allocator keeps counts as
resident, so the growth is an upper bound.
"""

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.core.measurement import MemoryUse


def local_bytes(tensor: Tensor) -> int:
    """Bytes of this rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def kept_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """(parameters, gradients, optimizer state) of this rank."""
    parameters = sum(local_bytes(parameter) for parameter in model.parameters())
    gradients = sum(local_bytes(p.grad) for p in model.parameters() if p.grad is not None)
    states = sum(
        local_bytes(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return parameters, gradients, states


class PeakMemory:
    """Peak of this process from here on, against what it held when this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident_before: int | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            self._active_before = torch.cuda.memory_stats(device)["active_bytes.all.current"]
        else:
            _return_freed_memory()
            self._resident_before = _status_bytes("VmRSS")

    def reset_peak(self) -> None:
        """Forgets peaks before this point (those of building the model)."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # 5 resets VmHWM: proc(5), /proc/pid/clear_refs
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self._resident_before = None

    def use(self, kept: tuple[int, int, int]) -> MemoryUse:
        """What was kept, and the peak since reset_peak()."""
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats(self._device)
            return MemoryUse(
                *kept,
                active_bytes=stats["active_bytes.all.peak"] - self._active_before,
                reserved_bytes=stats["reserved_bytes.all.peak"],
            )
        peak = _status_bytes("VmHWM")
        grown = None if peak is None or self._resident_before is None else peak - self._resident_before
        return MemoryUse(*kept, resident_bytes=grown)


def most_held_bytes(device: torch.device) -> int | None:
    """The most that this process has held so far: reserved on a GPU, resident on a CPU; None where the system
    doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_stats(device)["reserved_bytes.all.peak"])
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _return_freed_memory() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
