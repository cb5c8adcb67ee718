"""A rank's work, whoever started it: join the process group, find the entry function, call it."""

import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from shardwise.launch.assignment import START_S
from shardwise.launch.context import RankContext, backend_of
from shardwise.launch.mail import Kind

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


def load(entry: str) -> Callable[[RankContext, bytes], bytes]:
    """The function behind "package.module:function"."""
    module, _, function = entry.partition(":")
    return cast(Callable[[RankContext, bytes], bytes], getattr(importlib.import_module(module), function))


def context_of(
    device_type: str,
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    under_torchrun: bool,
    send: Callable[[Kind, bytes], None],
) -> RankContext:
    """What a rank is given; its group isn't joined yet."""
    import torch

    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device(device_type)
    return RankContext(rank, world_size, local_rank, device, backend_of(device_type), under_torchrun, send)


def join_group(store: "Store", context: RankContext, *, timeout_s: float) -> None:
    """Joins the default process group; on cuda makes device the current one. Waits for all ranks."""
    import torch
    from torch import distributed

    is_cuda = context.device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(context.device)
    # The group's timeout is the work's and may be short, so it must not begin while others still import
    # torch.
    store.set(f"here/{context.rank}", "")
    store.wait([f"here/{other}" for other in range(context.world_size)], timedelta(seconds=START_S))
    distributed.init_process_group(
        context.backend,
        store=store,
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=context.device if is_cuda else None,
    )
