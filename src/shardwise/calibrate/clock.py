"""How one kernel is timed: on a GPU inside a CUDA graph, so that no launch is in it; on a CPU by the wall clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

ENOUGH_S = 0.02  # of timed work per kernel
MOST_REPEATS = 50
FEWEST_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median, and the quartiles around it."""

    seconds: float
    low_s: float
    high_s: float
    repeats: int


def timing_of(times_s: list[float]) -> Timing:
    """Of at least one time."""
    low, _, high = quantiles(times_s, n=4) if len(times_s) > 1 else (times_s[0],) * 3
    return Timing(median(times_s), low, high, len(times_s))


def time_kernel(call: Callable[[], object], device: torch.device) -> Timing:
    """One call's time on the device. The call must do the same work each time and allocate nothing that it keeps."""
    return _on_cuda(call) if device.type == "cuda" else _on_cpu(call)


def _on_cpu(call: Callable[[], object]) -> Timing:
    call()
    once = _wall(call)
    times = [once]
    while len(times) < FEWEST_REPEATS or (sum(times) < ENOUGH_S and len(times) < MOST_REPEATS * 4):
        times.append(_wall(call))
    return timing_of(times)


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_cuda(call: Callable[[], object]) -> Timing:
    """Replays of a graph of several calls, each replay between two events; without a graph where the call can't be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels and allocate their workspaces
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    calls = 10
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        replay: Callable[[], object] = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

        def replay() -> None:
            for _ in range(calls):
                call()

    once = _between_events(replay)
    wanted = round(ENOUGH_S / max(once, 1e-7))
    times = [_between_events(replay) / calls for _ in range(min(MOST_REPEATS, max(FEWEST_REPEATS, wanted)))]
    return timing_of(times)


def _between_events(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
