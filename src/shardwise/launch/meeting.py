"""A part of torchrun's store that belongs to one start of the ranks.

torchrun keeps one store over all restarts, with what ranks that are dead by now have written: their addresses
above all, to which new ranks would try to connect for ever. Nothing in the environment tells every start from
the one before (a restart since a host has come or gone counts as none), so the ranks agree on a name: each
leaves a word of its own that was never said before, and the first answers every such word with the name.
"""

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from shardwise.core.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_S = 0.05


def met(store: "Store", rank: int, world_size: int, *, timeout_s: float) -> "Store":
    """The store's part for these ranks. All of them call it. Raises RunError where some don't come."""
    from torch.distributed.distributed_c10d import PrefixStore

    if rank == 0:
        return _hosted(store, world_size, timeout_s)
    word = uuid.uuid4().hex
    store.set(f"shardwise/word/{rank}", word)
    try:
        store.wait([f"shardwise/answer/{word}"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RunError(
            f"rank 0 didn't come within {timeout_s:g} s: {error}. See torchrun's output."
        ) from None
    part = PrefixStore(store.get(f"shardwise/answer/{word}").decode(), store)
    part.set(f"met/{rank}", "")
    return part


def _hosted(store: "Store", world_size: int, timeout_s: float) -> "Store":
    """Answers words, those of dead ranks too, until all ranks have heard the answer."""
    from torch.distributed.distributed_c10d import PrefixStore

    name = f"shardwise/{uuid.uuid4().hex}"
    part = PrefixStore(name, store)
    answered: dict[int, bytes] = {}
    missing = set(range(1, world_size))
    deadline_s = time.monotonic() + timeout_s
    while missing:
        for rank in sorted(missing):
            if part.check([f"met/{rank}"]):
                missing.discard(rank)
            elif store.check([f"shardwise/word/{rank}"]):
                word = store.get(f"shardwise/word/{rank}")
                if answered.get(rank) != word:
                    store.set(f"shardwise/answer/{word.decode()}", name)
                    answered[rank] = word
        if missing and time.monotonic() > deadline_s:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RunError(f"rank {ranks} didn't come within {timeout_s:g} s. See torchrun's output.")
        if missing:
            time.sleep(_POLL_S)
    return part
