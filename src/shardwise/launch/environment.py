"""The machine and the versions, as a report needs them."""

import os
import platform
from importlib import metadata
from pathlib import Path

from shardwise.core.measurement import Environment
from shardwise.launch.context import backend_of

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "THP_MEM_ALLOC_ENABLE",
    "GLOO_SOCKET_IFNAME",
    "NCCL_P2P_DISABLE",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here(world_size: int) -> int:
    """Ranks on this host: all of them, unless torchrun says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def device_type(device: str, world_size: int) -> str:
    """cpu or cuda; "auto" is cuda where there is a GPU for every rank on this host."""
    import torch

    if device != "auto":
        return device
    is_there = torch.cuda.is_available() and torch.cuda.device_count() >= ranks_here(world_size)
    return "cuda" if is_there else "cpu"


def threads_per_rank(world_size: int) -> int:
    """An equal part of this host's cores."""
    return max(1, cores() // ranks_here(world_size))


def available_memory() -> int | None:
    """Bytes that programs can still have; None where the system doesn't tell. Source: proc(5), meminfo."""
    return _meminfo("MemAvailable")


def describe(
    command: str,
    started: str,
    *,
    device_type: str,
    world_size: int,
    variables: tuple[tuple[str, str], ...] = (),
) -> Environment:
    """This machine, for a run of `world_size` ranks. variables: of the ranks' environment."""
    import torch

    versions = [
        ("shardwise", metadata.version("shardwise")),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
    ]
    versions += [(name, metadata.version(name)) for name in ("numpy", "tokenizers")]
    device = "CPU"
    if device_type == "cuda":
        device = torch.cuda.get_device_name(0)
        versions.append(("cuda", str(torch.version.cuda)))
        versions.append(("nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    return Environment(
        command=command,
        started=started,
        machine=f"{_processor()}, {platform.system()} {platform.release()}",
        device=device,
        backend=backend_of(device_type),
        world_size=world_size,
        threads_per_rank=threads_per_rank(world_size),
        cores=cores(),
        memory_bytes=_meminfo("MemTotal"),
        versions=tuple(versions),
        variables=variables,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
