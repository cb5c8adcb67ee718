"""How far apart ranks come to a collective, after works of several lengths.

Each rank works, waits until its device has, notes the moment and calls a small all-reduce. Ranks of one host
read one monotonic clock, so that the last one's moment is known to all; of several hosts nothing is timed.
"""

import time

import torch
import torch.distributed as dist

from shardwise.calibrate.clock import timing_of, trimmed_mean
from shardwise.core.sample import ARRIVAL, Sample
from shardwise.launch.environment import ranks_here
from shardwise.parallel.axis import Axis

WORKS = ((0, 40), (1, 30), (4, 16))
"""(matmuls before the collective, repeats)."""

SIDE = {"cpu": 768, "cuda": 4096}
"""Rows and columns of the matmul: some 10 ms of a CPU's core, 2 ms of an H100."""

FEWEST_REPEATS = 6


def one_clock(world_size: int) -> bool:
    """Whether all ranks are on this host."""
    return ranks_here(world_size) == world_size


def last_arrivals(starts_s: list[float], axis: Axis) -> list[float]:
    """When the last rank of the axis came to each of the collectives to which this one came at starts_s, on
    the host's clock."""
    latest = torch.tensor(starts_s, dtype=torch.float64, device=axis.device_type)
    dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=axis.group)
    return [float(each) for each in latest.tolist()]


def time_arrivals(axis: Axis, device: torch.device, *, quick: bool = False) -> list[Sample]:
    """One for each length of work; the same on all ranks of the axis, which must call it together."""
    side = SIDE[device.type]
    matrix, small = torch.randn(side, side, device=device), torch.zeros(1, device=device)
    samples = []
    for matmuls, repeats in WORKS:
        starts_s, worked_s = [], 0.0
        for _ in range(FEWEST_REPEATS if quick else repeats):
            dist.all_reduce(small, group=axis.group)
            _settled(device)
            before_s = time.perf_counter()
            for _ in range(matmuls):
                torch.mm(matrix, matrix)
            _settled(device)
            starts_s.append(time.perf_counter())
            worked_s += starts_s[-1] - before_s
            dist.all_reduce(small, group=axis.group)
        samples.append(_sample(starts_s, worked_s / len(starts_s), axis))
    return samples


def _sample(starts_s: list[float], work_s: float, axis: Axis) -> Sample:
    sums = torch.tensor([*starts_s, work_s], dtype=torch.float64, device=axis.device_type)
    dist.all_reduce(sums, group=axis.group)
    *means_s, work_s = (sums / axis.size).tolist()
    waits_s = [last - mean for last, mean in zip(last_arrivals(starts_s, axis), means_s, strict=True)]
    timing = timing_of(waits_s)
    return Sample(
        what=ARRIVAL,
        name="the last rank after the mean one",
        dtype="",
        shape=(round(work_s * 1e9),),
        seconds=trimmed_mean(waits_s),
        low_s=timing.low_s,
        high_s=timing.high_s,
        repeats=len(waits_s),
        ranks=axis.size,
    )


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
