"""Bytes of rank 0 on every rank, by the group that they have joined: no pickle."""

import torch
import torch.distributed as dist

from shardwise.launch.context import RankContext


def broadcast(body: bytes, context: RankContext) -> bytes:
    """Rank 0's bytes on every rank."""
    size = torch.tensor(len(body), dtype=torch.int64, device=context.device)
    dist.broadcast(size, 0)
    content = torch.empty(int(size.item()), dtype=torch.uint8, device=context.device)
    if context.rank == 0:
        content.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
    dist.broadcast(content, 0)
    return content.cpu().numpy().tobytes()
