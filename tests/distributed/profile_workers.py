"""Ranks that record a profile in which one of them comes late to a collective, and note by a clock that they
share when each came."""

import time
from collections.abc import Callable
from pathlib import Path

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
    """Runs the steps; the trace is in the job's folder. Returns when this rank came to the barrier before
    each collective of the marked steps, and to the collective, in ns."""
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
    came_ns: list[int] = []
    with record_profile(job.folder, model) as recorder:
        for step in range(WARM_UP + STEPS):
            with recorder.step():
                model(torch.ones(4, 32, device=context.device))
                for number, (late, collective) in enumerate(zip(job.late, collectives, strict=True)):
                    came_ns.append(time.monotonic_ns())
                    dist.barrier()
                    meeting = Path(f"{job.folder}-{step}-{number}")
                    if context.rank == late and step >= WARM_UP:
                        with torch.profiler.record_function("the planted sleep"):
                            _wait_for(meeting, world - 1)
                            time.sleep(SLEEP_S)
                    else:
                        meeting.mkdir(exist_ok=True)
                        (meeting / str(context.rank)).touch()
                    came_ns.append(time.monotonic_ns())
                    collective()
    return msgspec.json.encode(came_ns[2 * len(collectives) * WARM_UP :])


def _wait_for(meeting: Path, others: int) -> None:
    """Until the other ranks are about to begin: however slow they are, this one comes last."""
    while not meeting.is_dir() or len(list(meeting.iterdir())) < others:
        time.sleep(0.01)
