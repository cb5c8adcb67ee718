"""A rank's work, whoever started it: join the process group, find the entry function, call it."""

import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from shardwise.launch.assignment import START_S
from shardwise.launch.context import RankContext, backend_of

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store


def load(entry: str) -> Callable[[RankContext, bytes], bytes]:
    """The function behind "package.module:function"."""
    module, _, function = entry.partition(":")
    return cast(Callable[[RankContext, bytes], bytes], getattr(importlib.import_module(module), function))


def device_of(device_type: str, local_rank: int) -> "torch.device":
    import torch

    return torch.device("cuda", local_rank) if device_type == "cuda" else torch.device(device_type)


def join_group(
    store: "Store", device: "torch.device", *, rank: int, world_size: int, timeout_s: float
) -> None:
    """Joins the default process group through store; on cuda makes device the current one. Waits for all ranks."""
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The group's timeout is the work's and may be short, so it must not begin while others still import torch.
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)], timedelta(seconds=START_S))
    distributed.init_process_group(
        backend_of(device.type),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
