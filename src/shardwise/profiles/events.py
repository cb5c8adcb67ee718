"""The text of a Chrome trace -> its events, typed, in batches, and its header: streamed, with bounds, past
damage.

The fast way decodes a few MiB of events at once. Where that fails, events are decoded one by one; what is
still not JSON is mended where the way is known (control characters, invalid UTF-8, bare quotes in a name),
else counted as lost. The header is what stands around `traceEvents`, before it or after it.

Pieces are cut before an event's first key: `}, {"ph"` can't stand inside a JSON string, since its quote would
be escaped.
"""

import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from decimal import Decimal
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from shardwise.core.timeline import NONE
from shardwise.profiles.array_end import is_end_of_file, objects_among_others

MOST_HEADER_BYTES = 64 << 20
MOST_EVENT_BYTES = 16 << 20
CUT_OFF = "cut off at the end of the file"
"""Of what is lost: the file ends in the middle of an event."""
_NO_OBJECT = "not an object {...}, as an event is"
_BAD, _MENDED = "not JSON", "mended: control characters, invalid UTF-8 or bare quotes"

Scalar = int | str | float | bool | None


class Args(msgspec.Struct, gc=False):
    """What is read of an event's args. Sizes are elements, as the profiler writes them, but for copies. NONE:
    of what becomes a column of numbers, what isn't there."""

    external_id: Scalar = msgspec.field(name="External id", default=NONE)
    old_external_id: Scalar = msgspec.field(name="external id", default=NONE)
    correlation: Scalar = NONE
    dims: msgspec.Raw | UnsetType = msgspec.field(name="Input Dims", default=UNSET)
    types: msgspec.Raw | UnsetType = msgspec.field(name="Input type", default=UNSET)
    n_bytes: Scalar = msgspec.field(name="bytes", default=NONE)
    collective: Scalar = msgspec.field(name="Collective name", default=None)
    elements_in: Scalar = msgspec.field(name="In msg nelems", default=None)
    elements_out: Scalar = msgspec.field(name="Out msg nelems", default=None)
    dtype: Scalar = None
    group: Scalar = msgspec.field(name="Process Group Name", default=None)
    group_size: Scalar = msgspec.field(name="Group size", default=None)
    group_ranks: msgspec.Raw | UnsetType = msgspec.field(name="Process Group Ranks", default=UNSET)
    sequence: Scalar = msgspec.field(name="Seq", default=None)
    node: Scalar = msgspec.field(name="Sequence number", default=NONE)
    forward_thread: Scalar = msgspec.field(name="Fwd thread id", default=NONE)


class Event(msgspec.Struct, gc=False):
    """One event; ts and dur in microseconds."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: Scalar = None
    tid: Scalar = None
    ts: float | str | None = None
    dur: float | str | None = None
    args: Args | None = None


class ExactEvent(Event, gc=False):
    """For times that float64 would round: absolute microseconds with decimals."""

    ts: Decimal | None = None  # type: ignore[assignment]
    dur: Decimal | None = None  # type: ignore[assignment]


class ProcessGroup(msgspec.Struct, gc=False):
    pg_name: Scalar = None
    pg_desc: Scalar = None
    ranks: tuple[int, ...] | None = None


class Distributed(msgspec.Struct, gc=False):
    rank: int | None = None
    world_size: int | None = None
    backend: Scalar = None
    pg_config: list[ProcessGroup] = []


class Device(msgspec.Struct, gc=False):
    name: Scalar = None


class Header(msgspec.Struct, gc=False):
    """What stands around the events."""

    distributed: Distributed | None = msgspec.field(name="distributedInfo", default=None)
    base_ns: int | str | None = msgspec.field(name="baseTimeNanoseconds", default=None)
    devices: list[Device] = msgspec.field(name="deviceProperties", default_factory=list)

    @property
    def job(self) -> Distributed:
        """What it says of all ranks."""
        return self.distributed or Distributed()


_DECODE = msgspec.json.Decoder(list[Event])
_DECODE_EXACTLY = msgspec.json.Decoder(list[ExactEvent])
_DECODE_HEADER = msgspec.json.Decoder(Header)
_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError)

_KEYS = rb'"(?:ph|name|cat|pid|tid|ts|dur|id|args|bp|s)"\s*:'
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{\s*" + _KEYS + rb")")
_MAYBE_LAST = re.compile(rb"\}\s*\]")
# possessive, so that a giant string costs no stack; a lone quote is a string whose end isn't here yet
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]"]', re.DOTALL)
_AFTER_ARRAY = re.compile(rb'\s*(?:,\s*"|\Z)')
_AFTER_ARRAY_AT_THE_END = re.compile(rb'\s*(?:,\s*"|\}?\s*\Z)')
# an event whose args hold what looks like events is cut into several pieces
_MOST_JOINED = 16
_OPENS_ARRAY = re.compile(rb"\s*:\s*\[")
# float64 keeps nanoseconds up to here: half a step of its last place is less than half a nanosecond
_EXACT_US = 2.0**43
_LONG_DECIMAL = re.compile(rb'"ts"\s*:\s*"?\d{13,}\.\d*[1-9]')
_CONTROL = re.compile(rb"[\x00-\x1f]")
_NAME_BEGINS = re.compile(rb'"name"\s*:\s*"')
_NAME_ENDS = re.compile(rb'"\s*,\s*' + _KEYS)


class EventStream:
    """Iterate over it for batches of events; then `header` and `lost` are complete."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.header = Header()
        self.lost: Counter[str] = Counter()
        self._pieces = iter(pieces)
        self._buffer = b""
        self._head = b""
        self._is_bare = False
        self._has_array = False

    def __iter__(self) -> Iterator[list[Any]]:
        """Lists of Event or ExactEvent."""
        if self._seek_events():
            yield from self._events()
        self._read_header()

    # ------------------------------------------------------------------ before the events

    def _more(self) -> bool:
        piece = next(self._pieces, b"")
        self._buffer += piece
        return bool(piece)

    def _seek_events(self) -> bool:
        """Reads up to the first event; False where there are none."""
        while not self._buffer.lstrip():
            if not self._more():
                return False
        self._buffer = self._buffer.lstrip()
        if self._buffer.startswith(b"["):
            self._is_bare = True
            self._buffer = self._buffer[1:]
            return True
        at, depth = 0, 0
        while True:
            for token in _TOKEN.finditer(self._buffer, at):
                mark = token[0]
                if mark == b'"':
                    at = token.start()
                    break
                at = token.end()
                if mark in b"{[":
                    depth += 1
                elif mark in b"}]":
                    depth -= 1
                elif depth == 1 and mark == b'"traceEvents"':
                    while len(self._buffer) - at < 64 and self._more():
                        pass
                    opens = _OPENS_ARRAY.match(self._buffer, at)
                    if opens is not None:
                        self._head = self._buffer[: token.start()]
                        self._buffer = self._buffer[opens.end() :]
                        self._has_array = True
                        return True
            if len(self._buffer) > MOST_HEADER_BYTES or not self._more():
                self._head, self._buffer = self._buffer, b""
                return False

    # ------------------------------------------------------------------ the events

    def _events(self) -> Iterator[list[Any]]:
        is_skipping = False
        while True:
            cut = self._last_cut()
            if cut is None:
                if len(self._buffer) > MOST_EVENT_BYTES:
                    if not is_skipping:
                        self.lost[f"longer than {MOST_EVENT_BYTES >> 20} MiB"] += 1
                    is_skipping, self._buffer = True, self._buffer[-256:]
                if self._more():
                    continue
                if not is_skipping:
                    yield from self._last()
                return
            if is_skipping:  # what stands before the first cut is the rest of the giant
                first = _BETWEEN.search(self._buffer)
                assert first is not None
                self._buffer, is_skipping = self._buffer[first.end() :], False
                continue
            brace, rest = cut
            batch = self._decoded(self._buffer[: brace + 1])
            if batch is not None:
                self._buffer = self._buffer[rest:]
                yield batch
                continue
            end, is_array_end = yield from self._one_by_one(self._buffer[: brace + 1])
            if is_array_end:
                self._keep_tail(end)
                return
            self._buffer = self._buffer[end if end < brace + 1 else rest :]
            if end < brace + 1 and not self._more():
                yield from self._last()
                return

    def _last_cut(self) -> tuple[int, int] | None:
        """(where the last whole event's brace stands, where the next event begins)."""
        reach = 1 << 16
        while True:
            start = max(0, len(self._buffer) - reach)
            cut: re.Match[bytes] | None = None
            for each in _BETWEEN.finditer(self._buffer, start):
                cut = each
            if cut is not None:
                return cut.start(), cut.end()
            if start == 0:
                return None
            reach *= 8

    def _last(self) -> Iterator[list[Any]]:
        """What is left at the file's end: the last event, the array's end, the rest of the header."""
        end, is_array_end = yield from self._one_by_one(self._buffer, is_last=True)
        if is_array_end:
            self._keep_tail(end)
        else:
            self._buffer = b""

    def _decoded(self, text: bytes) -> list[Any] | None:
        array = b"[" + text + b"]"
        try:
            events = _DECODE.decode(array)
            if not events:
                return events
            # times of a file are alike: its first and last tell whether they are too large for float64
            if (_is_late(events[0]) or _is_late(events[-1])) and _LONG_DECIMAL.search(text):
                return _DECODE_EXACTLY.decode(array)
            return events
        except _BROKEN:
            return None

    def _one_by_one(
        self, text: bytes, *, is_last: bool = False
    ) -> Generator[list[Any], None, tuple[int, bool]]:
        """Yields what can be read; returns (how far it read, whether the array ends there). Before the file's
        end it leaves what may be the first part of an event."""
        readable: list[Any] = []
        cuts = [*((cut.start() + 1, cut.end()) for cut in _BETWEEN.finditer(text)), (len(text), len(text))]
        start, at = 0, 0
        while at < len(cuts):
            ends = [end for end, _ in cuts[at : at + _MOST_JOINED] if end - start <= MOST_EVENT_BYTES]
            events, taken, array_end = self._first(text, start, ends, is_last=is_last)
            if array_end is not None:
                yield readable + events
                return array_end, True
            if (
                not taken
                and not is_last
                and len(ends) < _MOST_JOINED
                and len(text) - start <= MOST_EVENT_BYTES
            ):
                break  # the rest of it may follow
            if not taken:
                events, taken = self._first_mended(text, start, ends)
            if taken:
                readable += events
            elif piece := text[start : cuts[at][0]].strip():
                if is_last and at == len(cuts) - 1:
                    objects, others = objects_among_others(text[start:]) or (b"", 0)
                    self.lost[_NO_OBJECT if others else CUT_OFF] += others or 1
                    readable += self._decoded(objects) or []
                elif b'"ph"' in piece:  # else it is the rest of one that is counted
                    self.lost[_BAD] += 1
            start = cuts[at + max(1, taken) - 1][1]
            at += max(1, taken)
        yield readable
        return start, False

    def _first(
        self, text: bytes, start: int, ends: list[int], *, is_last: bool
    ) -> tuple[list[Any], int, int | None]:
        """(the event at start, of how many pieces (0: none), where the array ends, if after it)."""
        for taken, end in enumerate(ends, 1):
            piece = text[start:end]
            events = self._decoded(piece)
            if events is not None and (taken == 1 or len(events) == 1):
                return events, taken, None
            closes = self._end_of_array(piece, is_last=is_last)
            if closes is not None:
                return closes[0], taken, start + closes[1]
        return [], 0, None

    def _first_mended(self, text: bytes, start: int, ends: list[int]) -> tuple[list[Any], int]:
        for taken, end in enumerate(ends, 1):
            events = self._mended(text[start:end])
            if events is not None and len(events) == 1:
                self.lost[_MENDED] += 1
                return events, taken
        return [], 0

    def _end_of_array(self, single: bytes, *, is_last: bool) -> tuple[list[Any], int] | None:
        """(the last event, where its array's bracket stands + 1), if the array ends in here. The last event
        may be broken itself: a bracket with which the file ends is the array's all the same."""
        if single.lstrip().startswith(b"]"):
            return [], single.index(b"]") + 1
        after = _AFTER_ARRAY_AT_THE_END if is_last else _AFTER_ARRAY
        for count, end in enumerate(_MAYBE_LAST.finditer(single)):
            if count == 16 or end.start() > MOST_EVENT_BYTES:
                return None
            if after.match(single, end.end()) is None:
                continue
            event = single[: end.start() + 1]
            events = self._decoded(event)
            if events is None and not _BETWEEN.search(event):  # it is one event
                ends_file = is_last and is_end_of_file(single[end.end() :])
                events = self._mended(event) or ([] if ends_file else None)
                if events is not None:
                    self.lost[_MENDED if events else _BAD] += 1
            if events is not None:
                return events, end.end()
        return None

    def _mended(self, single: bytes) -> list[Any] | None:
        if len(single) > MOST_EVENT_BYTES or not single.lstrip().startswith(b"{"):
            return None
        text = _CONTROL.sub(b" ", single).decode("utf-8", "replace").encode()
        events = self._decoded(text)
        if events is None:
            events = self._decoded(_with_quotes_escaped(text))
        return events

    # ------------------------------------------------------------------ after the events

    def _keep_tail(self, end: int) -> None:
        self._buffer = self._buffer[end:]
        self._has_array = True
        while len(self._buffer) <= MOST_HEADER_BYTES and self._more():
            pass

    def _read_header(self) -> None:
        if self._is_bare:
            return
        tail = self._buffer if len(self._buffer) <= MOST_HEADER_BYTES else b""
        joined = (
            self._head + b'"traceEvents":[]' + (tail if tail.strip() else b"}")
            if self._has_array
            else self._head
        )
        for text in (joined, self._head.rstrip().rstrip(b",") + b"}"):
            try:
                self.header = _DECODE_HEADER.decode(text)
                return
            except _BROKEN:
                continue
        self.lost["the file's header: not JSON, or of another form"] += 1
        base = re.search(rb'"baseTimeNanoseconds"\s*:\s*(\d{1,19})\b', self._head + tail)
        rank = re.search(rb'"distributedInfo"\s*:\s*\{[^{}]*?"rank"\s*:\s*(\d{1,7})\b', self._head + tail)
        self.header = Header(Distributed(int(rank[1])) if rank else None, int(base[1]) if base else None)


def _is_late(event: Event) -> bool:
    return isinstance(event.ts, str) or (isinstance(event.ts, float) and event.ts >= _EXACT_US)


def _with_quotes_escaped(text: bytes) -> bytes:
    """The event with its name's bare quotes escaped, up to the first thing that can follow a name."""
    begins = _NAME_BEGINS.search(text)
    ends = _NAME_ENDS.search(text, begins.end()) if begins is not None else None
    if begins is None or ends is None:
        return text
    name = text[begins.end() : ends.start()]
    if re.search(_KEYS, name):  # it reaches into the next event
        return text
    return text[: begins.end()] + re.sub(rb'(?<!\\)"', rb'\\"', name) + text[ends.start() :]
