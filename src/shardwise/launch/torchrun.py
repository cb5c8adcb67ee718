"""Ranks that torchrun started, on one host or many; torchrun owns signals and ends."""

import functools
import itertools
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from shardwise.core.errors import MeshError, RunError, ShardwiseError
from shardwise.launch.assignment import START_S
from shardwise.launch.cause import BadEnd, Failure, error_for
from shardwise.launch.entry import context_of, join_group, load
from shardwise.launch.mail import Inbox, Kind, Outbox
from shardwise.launch.meeting import met
from shardwise.launch.patience import Patience

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_S = 0.05
# Every run of this process gets a part of the store for itself: one run's keys would mislead the next.
_run_numbers = itertools.count()
_answer_numbers = itertools.count()


def joined() -> bool:
    """Whether torchrun (or what sets the same environment) started this process as one of several ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_restart() -> bool:
    """Whether torchrun has started these ranks again after a failure."""
    return joined() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def is_main() -> bool:
    """Whether this is the process that prints and writes: the only one, or torchrun's rank 0."""
    return not joined() or int(os.environ["RANK"]) == 0


def from_main(answer: bool) -> bool:
    """The main process' answer, in every process: of the ranks that torchrun started all ask, in the same
    order. Raises RunError where the main one says nothing."""
    if not joined():
        return answer
    store, key = _rendezvous(), f"shardwise/answer/{next(_answer_numbers)}"
    if is_main():
        store.set(key, str(int(answer)))
        return answer
    try:
        return bool(int(store.get(key)))
    except RuntimeError as error:
        raise RunError(f"rank 0 didn't say whether to go on: {error}. See torchrun's output.") from None


def run(
    entry: str,
    payload: bytes,
    *,
    world_size: int,
    device_type: str,
    timeout_s: float,
    on_event: Callable[[bytes], None],
    threads_per_rank: int,
) -> list[bytes]:
    """run_ranks for one of torchrun's: rank 0 gets all results, and others' events once it is done. A rank
    that reports or notes nothing for timeout_s ends its process."""
    _check_size(world_size)
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    _check_device(device_type, local_rank)

    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    torch.set_num_threads(threads_per_rank)
    store = PrefixStore(f"shardwise/{next(_run_numbers)}", _rendezvous())
    outbox = Outbox(store, rank)
    patience = Patience(rank, timeout_s)

    def send(kind: Kind, body: bytes) -> None:
        patience.heard(body.decode() if kind is Kind.NOTE else None)
        match kind:
            case Kind.NOTE:
                pass
            case Kind.EVENT if rank == 0:
                on_event(body)
            case _:
                outbox.send(kind, body)

    context = context_of(
        device_type, rank=rank, local_rank=local_rank, world_size=world_size, under_torchrun=True, send=send
    )
    owns_group = not distributed.is_initialized()
    try:
        if owns_group:
            join_group(PrefixStore("group", store), context, timeout_s=timeout_s)
        with patience:
            result = load(entry)(context, payload)
    except ShardwiseError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        end = BadEnd(rank, time.time(), failure=Failure.of(error), exit_code=None)
        raise error_for(end, world_size=1, note=patience.note, log=None) from error
    outbox.send(Kind.RESULT, result)
    results = _gather(Inbox(store), world_size, timeout_s, on_event) if rank == 0 else []
    # Rank 0 may host the store, so nobody leaves before all results are in.
    distributed.barrier()
    if owns_group:
        distributed.destroy_process_group()
    return results


def _gather(
    inbox: Inbox, world_size: int, timeout_s: float, on_event: Callable[[bytes], None]
) -> list[bytes]:
    results: dict[int, bytes] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(results) < world_size:
        for mail in inbox.collect():
            if mail.kind is Kind.RESULT:
                results[mail.rank] = mail.body
            else:
                on_event(mail.body)
        missing = sorted(set(range(world_size)) - results.keys())
        if missing and time.monotonic() > deadline_s:
            ranks = ", ".join(map(str, missing))
            raise RunError(
                f"no result came from rank {ranks} within {timeout_s:g} s of rank 0's. See torchrun's output."
            )
        time.sleep(_POLL_S)
    return [results[rank] for rank in range(world_size)]


@functools.cache
def _rendezvous() -> "Store":
    """The part of torchrun's store for this start of the ranks. Cached: without an agent, rank 0 hosts it,
    and it ends with the last reference."""
    from torch.distributed.rendezvous import rendezvous

    store: Store
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=START_S)))
    return met(store, rank, world_size, timeout_s=START_S)


def _check_size(world_size: int) -> None:
    started = int(os.environ["WORLD_SIZE"])
    if world_size != started:
        raise MeshError(
            f"mesh: {world_size} ranks asked for, but torchrun started {started}. "
            f"Use a mesh of {started} ranks, "
            f"or start {world_size} with torchrun (--nproc-per-node, --nnodes)."
        )


def _check_device(device_type: str, local_rank: int) -> None:
    if device_type != "cuda":
        return
    import torch

    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise MeshError(
            f"mesh: local rank {local_rank} has no GPU of its own; this machine has {gpus}. "
            f"Start at most {gpus} ranks a machine, or use the CPU."
        )
