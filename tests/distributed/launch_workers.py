"""What the ranks of test_launch.py run. Entry functions, so all are called with (context, payload)."""

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable

import numpy
import torch
from torch import distributed

from shardwise.core.errors import PlanError
from shardwise.launch import RankContext

MANY_BYTES = 9 * 2**20
NAMES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "THP_MEM_ALLOC_ENABLE",
    "GLOO_SOCKET_IFNAME",
)


def _sum_of_ranks(context: RankContext) -> int:
    total = torch.full((4,), float(context.rank), device=context.device)
    distributed.all_reduce(total)
    return int(total[0])


def tour(context: RankContext, payload: bytes) -> bytes:
    """Everything that goes well: events, notes, a collective, results and payloads larger than the store
    takes at once."""
    for index in range(20):
        context.note(f"round {index}")
        if context.rank == 0:
            context.report(f"event {index}".encode())
    context.report(b"x" * MANY_BYTES)
    facts = {
        "rank": context.rank,
        "world_size": context.world_size,
        "device": str(context.device),
        "backend": context.backend,
        "under_torchrun": context.under_torchrun,
        "sum": _sum_of_ranks(context),
        "payload_bytes": len(payload),
        "environment": {name: os.environ.get(name) for name in NAMES},
    }
    return json.dumps(facts).encode().ljust(MANY_BYTES)


def threads(context: RankContext, payload: bytes) -> bytes:
    _sum_of_ranks(context)  # else one may end before the other has joined
    return str(torch.get_num_threads()).encode()


def random_numbers(context: RankContext, payload: bytes) -> bytes:
    """What nobody seeded."""
    _sum_of_ranks(context)
    return json.dumps([random.random(), float(numpy.random.rand())]).encode()


def imported(context: RankContext, payload: bytes) -> bytes:
    """Whether the module of this name is, without anything having asked for it."""
    _sum_of_ranks(context)
    return b"yes" if payload.decode() in sys.modules else b"no"


def say_pid_and_wait(context: RankContext, payload: bytes) -> bytes:
    context.note("round 3 of 12: colwise")
    context.report(f"{context.rank} {os.getpid()}".encode())
    _sum_of_ranks(context)
    if context.rank == 0:
        distributed.barrier()  # the others never come
    while True:
        time.sleep(60)


def say_a_last_word_when_asked_to_end(context: RankContext, payload: bytes) -> bytes:
    """Rank 0 does; rank 1 dies."""
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, note)
    _sum_of_ranks(context)
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not asked:
        time.sleep(0.05)
    context.report(b"what was done until the end")
    time.sleep(60)
    return b""


def say_pid_and_keep_noting(context: RankContext, payload: bytes) -> bytes:
    context.report(f"{context.rank} {os.getpid()}".encode())
    if context.rank == 0:
        distributed.barrier()  # rank 1 never comes
    while True:
        context.note("still busy")
        time.sleep(0.2)


def _value_error(context: RankContext) -> None:
    raise ValueError("the first line\nand a second one")


def _plan_error(context: RankContext) -> None:
    raise PlanError('rule "a" matches nothing. Name a module of the model.')


def _silent_exit(context: RankContext) -> None:
    print("last words", file=sys.stderr)
    os._exit(7)


def _no_result(context: RankContext) -> None:
    os._exit(0)


def _segfault(context: RankContext) -> None:
    ctypes.string_at(0)


def _terminated(context: RankContext) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


_FAILURES: dict[bytes, Callable[[RankContext], None]] = {
    b"value error": _value_error,
    b"plan error": _plan_error,
    b"silent exit": _silent_exit,
    b"no result": _no_result,
    b"segfault": _segfault,
    b"terminated": _terminated,
}


def fail_on_rank_1(context: RankContext, payload: bytes) -> bytes:
    """Rank 1 fails as payload says; rank 0 waits for it in a collective and sees a lost connection."""
    context.report(f"{context.rank} {os.getpid()}".encode())
    context.note("the check")
    if context.rank == 1:
        _FAILURES[payload](context)
    _sum_of_ranks(context)
    return b""
