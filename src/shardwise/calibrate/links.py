"""Collectives by kind, size and group, through the functions that the native engine uses.

On a CPU a rank works for a moment before each one, as a step does, and the wall clock counts from the moment
at which the last rank comes (arrivals.py: what ranks wait until then is fitted apart): so what the system
takes to wake a rank up is in the times. Where no clock is common, and of a broadcast, whose root waits for
nobody, it counts from the rank's own call, and waiting is in them. On GPUs: between events, several in a row.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardwise.calibrate.arrivals import last_arrivals, one_clock
from shardwise.calibrate.clock import CALLS, Timing, between_events, timing_of, trimmed_mean
from shardwise.core.collective import TIMED, CollectiveKind, Origin, wire_bytes
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.core.placement import Replicate
from shardwise.core.sample import Sample
from shardwise.parallel import exchanges
from shardwise.parallel.axis import Axis

AXIS = TENSOR_AXIS
ORIGIN = Origin("calibrate", None, Replicate(), Replicate())
ENOUGH_S = 0.08
MOST_REPEATS = 40
FEWEST_REPEATS = 6
WORK = 768  # rows and columns of the matmul that stands for a step's work between collectives: some 10 ms


@dataclass(frozen=True, slots=True)
class Group:
    """The first `size` ranks."""

    size: int
    axis: Axis | None  # None: this rank is none of them
    one_clock: bool = False  # whether all ranks read the same


def groups(world_size: int, device_type: str) -> list[Group]:
    """Of 2, 4, 8, ... and all ranks. Every rank must call it."""
    sizes = {2**power for power in range(1, 11)}
    made = []
    for size in sorted({size for size in sizes if size < world_size} | {world_size} - {1}):
        mesh = DeviceMesh(device_type, list(range(size)), mesh_dim_names=(AXIS,))
        axis = Axis.of(mesh, AXIS) if dist.get_rank() < size else None
        of_backend = axis and replace(axis, pairwise_reduce_scatter=False)
        made.append(Group(size, of_backend, one_clock(world_size)))
    return made


def sizes_for(device_type: str, *, quick: bool) -> list[int]:
    """Bytes of the full tensor."""
    if quick:
        return [1 << 10, 1 << 16, 1 << 20]
    most = 26 if device_type == "cpu" else 28
    return [1 << power for power in range(10, most + 1, 2)]


def time_collective(
    kind: CollectiveKind,
    full_bytes: int,
    axis: Axis,
    device: torch.device,
    *,
    one_clock: bool = False,
    quick: bool = False,
) -> Sample:
    """This rank's time. All ranks of the axis must call it. one_clock: they read the same. quick: as few
    calls as make a time."""
    call, payload, sent = _prepared(kind, full_bytes // 4, axis, device)
    most = FEWEST_REPEATS if quick else MOST_REPEATS
    after_last = one_clock and kind is not CollectiveKind.BROADCAST
    on_cuda = device.type == "cuda"
    timing = _on_cuda(call, axis, most) if on_cuda else _on_cpu(call, axis, most, after_last=after_last)
    return Sample(
        what=str(kind),
        name=str(kind),
        dtype="float32",
        shape=(payload,),
        seconds=timing.seconds,
        low_s=timing.low_s,
        high_s=timing.high_s,
        repeats=timing.repeats * (CALLS if device.type == "cuda" else 1),
        write_bytes=round(sent),
        ranks=axis.size,
    )


def _prepared(
    kind: CollectiveKind, elements: int, axis: Axis, device: torch.device
) -> tuple[Callable[[], Tensor], int, float]:
    """The call, its payload, and what a rank sends."""
    elements = max(axis.size, elements // axis.size * axis.size)
    full_bytes = elements * 4
    sent = wire_bytes(kind, full_bytes, axis.size)
    match kind:
        case CollectiveKind.ALL_REDUCE:
            whole = torch.zeros(elements, device=device)
            return lambda: exchanges.sum_now(whole, axis, ORIGIN), full_bytes, sent
        case CollectiveKind.ALL_GATHER:
            part = torch.zeros(elements // axis.size, device=device)
            return lambda: exchanges.gather_now(part, 0, axis, elements, ORIGIN), full_bytes, sent
        case CollectiveKind.REDUCE_SCATTER:
            whole = torch.zeros(elements, device=device)
            return lambda: exchanges.scatter_sum_now(whole, 0, axis, ORIGIN), full_bytes, sent
        case CollectiveKind.ALL_TO_ALL:  # blocks for the others alone: all of it is sent
            blocks = torch.zeros(axis.size - 1, elements // axis.size, device=device)
            n_bytes = blocks.numel() * 4
            return lambda: exchanges.swap_others_now(blocks, axis, ORIGIN), n_bytes, float(n_bytes)
        case CollectiveKind.BROADCAST:
            whole = torch.zeros(elements, device=device)
            return lambda: _broadcast(whole, axis), full_bytes, sent
        case _:
            raise AssertionError(f"{kind} isn't timed")


def _broadcast(whole: Tensor, axis: Axis) -> Tensor:
    dist.broadcast(whole, 0, group=axis.group)
    return whole


def _on_cpu(call: Callable[[], Tensor], axis: Axis, most: int, *, after_last: bool) -> Timing:
    """The mean counts, not the median: a step meets the slow ones too. after_last: from when the last rank
    came."""
    work = torch.zeros(WORK, WORK)
    call()
    starts_s, ends_s = [], []
    for _ in range(_repeats(_wall(call), axis, most)):
        torch.mm(work, work)
        starts_s.append(time.perf_counter())
        call()
        ends_s.append(time.perf_counter())
    begins_s = last_arrivals(starts_s, axis) if after_last else starts_s
    times = [end - begin for begin, end in zip(begins_s, ends_s, strict=True)]
    return replace(timing_of(times), seconds=trimmed_mean(times))


def _on_cuda(call: Callable[[], Tensor], axis: Axis, most: int) -> Timing:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    calls()
    torch.cuda.synchronize()
    repeats = _repeats(between_events(calls, behind=True), axis, most)
    return timing_of([between_events(calls, behind=True) / CALLS for _ in range(repeats)])


def _repeats(once_s: float, axis: Axis, most: int) -> int:
    """How often to time what takes this rank once_s; the same on all of them."""
    slowest = torch.tensor(once_s, device=axis.device_type)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=axis.group)
    return min(most, max(FEWEST_REPEATS, round(ENOUGH_S / max(slowest.item(), 1e-6))))


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plan(world: list[Group], device_type: str, *, quick: bool) -> Iterator[tuple[Group, CollectiveKind, int]]:
    """What is timed, in order, the same on every rank."""
    for group in world:
        for kind in TIMED:
            for full_bytes in sizes_for(device_type, quick=quick):
                yield group, kind, full_bytes
