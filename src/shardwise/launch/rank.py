"""One rank: `python -m shardwise.launch.rank MODULE:FUNCTION`, started by ranks.py, which waits for mail."""

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from shardwise.launch import leave
from shardwise.launch.assignment import START_S, Assignment

if TYPE_CHECKING:
    from shardwise.launch.mail import Outbox

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# On a hang the parent's own timeout should come first, since it can name what every rank was at. The last
# that it hears is where a rank waits, which train/whereabouts.py tells up to 2.5 s after the wait began.
_GROUP_TIMEOUT_MARGIN_S = 5.0


def main(entry: str) -> int:
    assignment = Assignment.from_environment(os.environ)
    _die_with(assignment.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    gc.disable()  # until all is imported, which leaves nothing to collect: a fifth of the time

    from torch import distributed

    from shardwise.launch.mail import Kind, Outbox, take
    from shardwise.launch.store import connect

    store = connect(assignment.store_port, timeout_s=START_S)
    outbox = Outbox(store, assignment.rank)
    try:
        result = _work(entry, assignment, outbox, take(store, "payload"))
        outbox.send(Kind.RESULT, result)
        outbox.flush()
        distributed.destroy_process_group()
    except BaseException as error:
        _report(error, outbox)
        # Taking down a broken process group can hang, so don't.
        os._exit(1)
    return 0


def _work(entry: str, assignment: Assignment, outbox: "Outbox", payload: bytes) -> bytes:
    from torch.distributed.distributed_c10d import PrefixStore

    from shardwise.launch.entry import context_of, join_group, load
    from shardwise.launch.mail import Kind
    from shardwise.launch.store import connect

    function = load(entry)
    gc.enable()
    context = context_of(
        assignment.device_type,
        rank=assignment.rank,
        local_rank=assignment.rank,
        world_size=assignment.world_size,
        under_torchrun=False,
        send=outbox.send,
    )
    store = PrefixStore("group", connect(assignment.store_port, timeout_s=START_S))
    join_group(store, context, timeout_s=assignment.timeout_s + _GROUP_TIMEOUT_MARGIN_S)
    outbox.send(Kind.READY, b"")
    return function(context, payload)


def _report(error: BaseException, outbox: "Outbox") -> None:
    """To the parent first: the log may be on a full disk."""
    import msgspec

    from shardwise.core.errors import ShardwiseError
    from shardwise.launch.cause import Failure
    from shardwise.launch.mail import Kind

    with suppress(RuntimeError):
        outbox.send(Kind.FAILURE, msgspec.json.encode(Failure.of(error)))
        outbox.flush()
    if not isinstance(error, ShardwiseError):
        with suppress(OSError):
            traceback.print_exception(error)


def _die_with(parent_pid: int) -> None:
    """Has Linux kill this rank when its parent dies, however that is; ends it now if that is past."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


if __name__ == "__main__":
    leave.at_once(main(sys.argv[1]))
