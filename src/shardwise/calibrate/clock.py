"""How one kernel is timed.

GPU   inside a CUDA graph, so that no launch is in it. What can't be captured (attention draws from the random
      generator, and a capture that fails leaves the generator broken) runs between two events behind a sleep
      that lets the host run ahead
CPU   with inputs where a step finds them, in the caches that cores share but not in the core's own (other
      memory is written between calls); by this thread's own seconds, which other processes on the same cores
      don't lengthen; `own_s` over `wall_s` tells what share of a core the rank got, and who adds the samples
      up divides by it. With several threads, by the wall clock
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median, quantiles

import torch

from shardwise.torch_private import cuda_sleep

ENOUGH_S = 0.02  # of timed work per kernel
MOST_REPEATS = 50
FEWEST_REPEATS = 5
FEWEST_LONG_REPEATS = 3  # of what takes longer than ENOUGH_S
OWN_CACHE_BYTES = 4 << 20  # more than a core's own caches hold
CALLS = 10  # in a graph
AHEAD_CYCLES = 4_000_000  # of a GPU's clock, some 2 ms: what the host needs to issue CALLS calls


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median, and the quartiles around it. own_s, wall_s: of all calls together, by
    this thread and by the wall."""

    seconds: float
    low_s: float
    high_s: float
    repeats: int
    own_s: float = 0.0
    wall_s: float = 0.0


def usual_share(timings: Iterable[Timing]) -> float:
    """Of a core that the thread got: the median over what it worked. Another program that ran for a while
    beside a few kernels is not the machine's pace, and the mean would count that while the more, the slower
    it made them. 1 where nothing was timed."""
    shares = sorted((min(1.0, each.own_s / each.wall_s), each.own_s) for each in timings if each.wall_s > 0)
    half_s = sum(own_s for _, own_s in shares) / 2
    for share, own_s in shares:
        half_s -= own_s
        if half_s <= 0:
            return share
    return 1.0


def timing_of(times_s: list[float], wall_s: float = 0.0) -> Timing:
    """Of at least one time."""
    low, _, high = quantiles(times_s, n=4) if len(times_s) > 1 else (times_s[0],) * 3
    return Timing(median(times_s), low, high, len(times_s), sum(times_s), wall_s)


def trimmed_mean(times: list[float]) -> float:
    """Without the largest and the smallest tenth."""
    cut = len(times) // 10
    return fmean(sorted(times)[cut : len(times) - cut])


def time_kernel(call: Callable[[], object], device: torch.device, *, graph: bool = True) -> Timing:
    """One call's time on the device. The call must do the same work each time and keep nothing that it
    allocates. graph: False where it can't be captured."""
    if device.type != "cuda":
        return _on_cpu(call)
    return _on_cuda(call, graph=graph)


def host_clock(device: torch.device) -> Callable[[], float]:
    """Seconds of the host's work: this thread's own where one CPU thread does it all, else the wall's."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _on_cpu(call: Callable[[], object]) -> Timing:
    clock = host_clock(torch.device("cpu"))
    other = torch.zeros(OWN_CACHE_BYTES // 4)
    call()
    times: list[float] = []
    wall_s = 0.0
    while not _enough(times):
        other.add_(1.0)
        began, start = time.perf_counter(), clock()
        call()
        times.append(clock() - start)
        wall_s += time.perf_counter() - began
    return timing_of(times, wall_s)


def _enough(times: list[float]) -> bool:
    fewest = FEWEST_LONG_REPEATS if sum(times) > ENOUGH_S * FEWEST_LONG_REPEATS else FEWEST_REPEATS
    return len(times) >= fewest and (sum(times) >= ENOUGH_S or len(times) >= MOST_REPEATS * 4)


def _on_cuda(call: Callable[[], object], *, graph: bool) -> Timing:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels and allocate their workspaces
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    replay = _captured(call) if graph else _issued(call)
    once = between_events(replay, behind=not graph)
    wanted = round(ENOUGH_S / max(once, 1e-7))
    repeats = min(MOST_REPEATS, max(FEWEST_REPEATS, wanted))
    return timing_of([between_events(replay, behind=not graph) / CALLS for _ in range(repeats)])


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog may ask for events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    return graph.replay


def _issued(call: Callable[[], object]) -> Callable[[], object]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def between_events(call: Callable[[], object], *, behind: bool) -> float:
    """Seconds of the current stream. behind: the device sleeps first, so that calls are issued in time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if behind:
        cuda_sleep(AHEAD_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
