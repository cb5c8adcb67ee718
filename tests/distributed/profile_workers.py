"""Ranks that record a profile in which one of them comes late to a collective, by a sleep whose length is known."""

import time
from collections.abc import Callable

import msgspec
import torch
import torch.distributed as dist

from shardwise.launch import RankContext
from shardwise.measure.profile import WARM_UP, record_profile

STEPS = 2
SLEEP_S = 0.25


class Job(msgspec.Struct):
    """late: for each collective of a step, in order, the rank that sleeps before it."""

    folder: str
    late: list[int]


def record(context: RankContext, payload: bytes) -> bytes:
    """Runs the steps; the trace is in the job's folder."""
    job = msgspec.json.decode(payload, type=Job)
    world = context.world_size
    model = torch.nn.Sequential(torch.nn.Linear(32, 32)).to(context.device)
    x = torch.ones(world * 4096, device=context.device)
    out = torch.empty_like(x)
    part = torch.empty(4096, device=context.device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collectives: list[Callable[[], object]] = [
        lambda: dist.all_reduce(x),
        lambda: gather(out, part),
        lambda: dist.all_to_all_single(out, x),
    ]
    with record_profile(job.folder, model) as recorder:
        for step in range(WARM_UP + STEPS):
            with recorder.step():
                model(torch.ones(4, 32, device=context.device))
                for late, collective in zip(job.late, collectives, strict=True):
                    dist.barrier()
                    if context.rank == late and step >= WARM_UP:
                        with torch.profiler.record_function("the planted sleep"):
                            time.sleep(SLEEP_S)
                    collective()
    return b""
