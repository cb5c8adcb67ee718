"""The collective that a rank's device or backend hasn't done, as PyTorch's flight recorder has it.

A host issues GPU work ahead: when nothing moves, its frames may stand far behind the collective that hangs.
"""

from collections.abc import Iterator
from contextlib import suppress

import msgspec

from shardwise.torch_private import flight_records

_DONE = "completed"


class Entry(msgspec.Struct, frozen=True):
    """A collective in the recorder's file format (version 2.10), what is read of it. input_sizes: of each
    tensor. seq_id: the how-manieth collective of its process group, from 1; p2p_seq_id: of those that send
    or receive."""

    record_id: int
    profiling_name: str
    state: str
    retired: bool
    process_group: tuple[str, str]
    seq_id: int = msgspec.field(name="collective_seq_id", default=0)
    p2p_seq_id: int = 0
    is_p2p: bool = False
    input_sizes: tuple[tuple[int, ...], ...] = ()
    input_dtypes: tuple[str, ...] = ()


class Record(msgspec.Struct, frozen=True):
    entries: tuple[msgspec.Raw, ...] = ()


def unfinished() -> str:
    """This rank's oldest collective that isn't done, in words; empty where all are, or nothing is known."""
    return next(filter(None, map(oldest_unfinished, flight_records())), "")


def oldest_unfinished(record: bytes) -> str:
    """record: a flight recorder's JSON. What can't be read is unknown, and so empty."""
    open_ones = [each for each in _entries(record) if not each.retired and each.state != _DONE]
    return _in_words(min(open_ones, key=lambda each: each.record_id)) if open_ones else ""


def _entries(record: bytes) -> Iterator[Entry]:
    try:
        for raw in msgspec.json.decode(record, type=Record).entries:
            with suppress(msgspec.MsgspecError):
                yield msgspec.json.decode(raw, type=Entry)
    except msgspec.MsgspecError:
        return


def _in_words(entry: Entry) -> str:
    backend, _, name = entry.profiling_name.partition(":")
    sizes = zip(entry.input_dtypes, entry.input_sizes, strict=False)
    of = ", ".join(f"{dtype.lower()}[{','.join(map(str, size))}]" for dtype, size in list(sizes)[:2])
    group, about = entry.process_group
    where = f"{group} ({about})" if about not in ("", "undefined") else group
    return (
        f"{name or backend}{f' of {of}' if of else ''}, number {entry.seq_id} of group {where}, {entry.state}"
    )
