"""Small Chrome traces, written as Kineto writes them: times in microseconds after START_US."""

import json
from pathlib import Path
from typing import Any

# a record at 0 is one that was never filled in
START_US = 1000


def kernel(
    name: str,
    at_us: float,
    for_us: float,
    *,
    stream: int = 7,
    correlation: int = 0,
    args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return event(
        "kernel",
        name,
        at_us,
        for_us,
        pid=0,
        tid=stream,
        args={"stream": stream, "correlation": correlation} | (args or {}),
    )


def launch(at_us: float, correlation: int, *, for_us: float = 1, tid: int = 1) -> dict[str, Any]:
    return event(
        "cuda_runtime", "cudaLaunchKernel", at_us, for_us, tid=tid, args={"correlation": correlation}
    )


def step(number: int, at_us: float, for_us: float) -> dict[str, Any]:
    return event("user_annotation", f"ProfilerStep#{number}", at_us, for_us)


def event(
    cat: str,
    name: str,
    at_us: float,
    for_us: float,
    *,
    pid: int = 100,
    tid: int = 1,
    args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": START_US + at_us,
        "dur": for_us,
        "args": args or {},
    }


def all_reduce(
    at_us: float,
    for_us: float,
    *,
    elements: int = 1024,
    ranks: tuple[int, ...] = (0, 1),
    args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    described = {
        "Collective name": "allreduce",
        "In msg nelems": elements,
        "Out msg nelems": elements,
        "dtype": "Float",
        "Group size": len(ranks),
        "Process Group Name": "0",
        "Process Group Ranks": str(list(ranks)),
    }
    return kernel(
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        at_us,
        for_us,
        stream=20,
        args=described | (args or {}),
    )


def document(
    events: list[dict[str, Any]], *, rank: int = 0, world_size: int = 2, **header: Any
) -> dict[str, Any]:
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100"}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world_size},
        "traceEvents": events,
        "traceName": "trace.json",
        "baseTimeNanoseconds": 1_700_000_000_000_000_000,
    } | header


def write(path: Path, events: list[dict[str, Any]], **header: Any) -> Path:
    path.write_text(json.dumps(document(events, **header)))
    return path
