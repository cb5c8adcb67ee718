"""Events of a trace file -> growing columns, one row a span; what can't be a span is counted as lost."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from shardwise.core.timeline import NONE, SpanKind
from shardwise.profiles import classify
from shardwise.profiles.events import Args

MOST_NAME = 4096
_NS_PER_US = 1000
_BLANK = re.compile(rb"\s+")
_MOST_TIME_NS = 1 << 62
_MOST_LENGTH_NS = 1 << 50  # 13 days: sums of them stay within 64 bits
_NO_ARGS = Args()


class Numbers(dict[Any, int]):
    """Numbers things in the order in which they are first seen."""

    def __missing__(self, key: Any) -> int:
        self[key] = number = len(self)
        return number


class _Names(Numbers):
    """Numbers names, cut to what anybody reads; `length` of all of them."""

    length = 0

    def __missing__(self, key: str) -> int:
        if len(key) > MOST_NAME:
            return self[f"{key[: MOST_NAME - 1]}…"]
        self.length += len(key)
        return super().__missing__(key)


class _Shapes(dict[bytes, int]):
    """A shape's JSON -> its number among the names, without blanks and cut to what anybody reads."""

    def __init__(self, names: _Names) -> None:
        super().__init__()
        self._names = names

    def __missing__(self, raw: bytes) -> int:
        self[raw] = number = self._names[_BLANK.sub(b"", raw[:MOST_NAME]).decode("utf-8", "replace")]
        return number


class _Kinds(dict[tuple[str, str], int | None]):
    """(category, name) -> a SpanKind's number; None for what is no span."""

    def __missing__(self, key: tuple[str, str]) -> int | None:
        category, name = key
        if len(name) > MOST_NAME:
            return self[category, name[:MOST_NAME]]
        kind = classify.kind_of(category, name)
        self[key] = number = None if kind is None else int(kind)
        return number


class Columns:
    """Batches of events as columns. collectives: (span, args). lanes: (is a CPU's, process, thread)."""

    def __init__(self) -> None:
        self.n = 0
        self.lost: Counter[str] = Counter()
        self.names = _Names()
        self.lanes = Numbers()
        self.collectives: list[tuple[int, Args]] = []
        self._parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
        self._kinds = _Kinds()
        self._shapes = _Shapes(self.names)

    def column(self, key: str) -> NDArray[Any]:
        """The whole column; its parts are given up."""
        return np.concatenate(self._parts.pop(key))

    def add(self, batch: Sequence[Any]) -> None:
        known = self._kinds
        phases = [event.ph for event in batch]
        events = [event for event, phase in zip(batch, phases, strict=True) if phase == "X"]
        unfinished = phases.count("B")
        if unfinished:
            self.lost["events of the B/E form, which PyTorch doesn't write"] += unfinished
        kinds = [known[event.cat, event.name] for event in events]
        if None in kinds:
            events = [event for event, kind in zip(events, kinds, strict=True) if kind is not None]
            kinds = [kind for kind in kinds if kind is not None]
        if events:
            self._append(events, np.array(kinds, np.int8))

    def _append(self, events: list[Any], kind: NDArray[np.int8]) -> None:
        start, start_known = _nanoseconds([event.ts for event in events])
        length, length_known = _nanoseconds([event.dur for event in events])
        # a range may be empty; work of no length, or at no time, is a record that was never filled in
        is_filled = (kind > SpanKind.COPY) | ((start != 0) & (length > 0))
        good = start_known & length_known & is_filled & (length >= 0) & (length <= _MOST_LENGTH_NS)
        if not good.all():
            self.lost["events without a time or a duration"] += int((~good).sum())
            events = [event for event, keep in zip(events, good.tolist(), strict=True) if keep]
            kind, start, length = kind[good], start[good], length[good]
        names, lanes, shapes = self.names, self.lanes, self._shapes
        args = [event.args or _NO_ARGS for event in events]
        # a gloo collective stands on a CPU thread
        is_cpu = (kind >= SpanKind.OP).tolist()
        on_cpu = [cpu or e.cat.lower() == "user_annotation" for cpu, e in zip(is_cpu, events, strict=True)]
        lane = [lanes[cpu, e.pid, e.tid] for cpu, e in zip(on_cpu, events, strict=True)]
        columns: dict[str, NDArray[Any]] = {
            "lane": np.array(lane, np.int32),
            "kind": kind,
            "name": np.array([names[event.name] for event in events], np.int32),
            "shapes": np.array([NONE if a.dims is UNSET else shapes[bytes(a.dims)] for a in args], np.int32),
            "start": start,
            "end": start + length,
            "correlation": _integers([a.correlation for a in args]),
            "external": _integers(
                [a.old_external_id if a.external_id == NONE else a.external_id for a in args]
            ),
            "bytes": _integers([a.n_bytes for a in args]),
            "node": _integers([a.node for a in args]),
            "forward_thread": _integers([a.forward_thread for a in args]),
        }
        for key, column in columns.items():
            self._parts[key].append(column)
        for index in np.flatnonzero(kind == SpanKind.COLLECTIVE).tolist():
            self.collectives.append((self.n + index, _owned(args[index])))
        self.n += len(events)


def _owned(args: Args) -> Args:
    """The args without a hold on the piece of text that they came from."""
    for name in ("dims", "types", "group_ranks"):
        raw = getattr(args, name)
        if raw is not UNSET:
            setattr(args, name, raw.copy())
    return args


def _nanoseconds(times_us: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(nanoseconds, which are times at all), exact for what the text says up to the nanosecond."""
    try:
        us = np.array(times_us, np.float64)
        is_exact = not any(isinstance(time, Decimal) for time in times_us[:1])
    except (TypeError, ValueError):
        is_exact = False
    if is_exact:
        known = np.isfinite(us) & (np.abs(us) < _MOST_TIME_NS / _NS_PER_US)
        us = np.where(known, us, 0.0)
        whole = np.floor(us)
        part_ns = np.rint((us - whole) * _NS_PER_US).astype(np.int64)
        return whole.astype(np.int64) * _NS_PER_US + part_ns, known
    times = [_one_time(time) for time in times_us]
    ns = np.array([time or 0 for time in times], np.int64)
    return ns, np.array([time is not None for time in times], np.bool_)


def _one_time(time: Any) -> int | None:
    try:
        ns = round(Decimal(time) * _NS_PER_US)
    except (ArithmeticError, TypeError, ValueError, OverflowError):
        return None
    return ns if abs(ns) < _MOST_TIME_NS else None


def _integers(values: list[Any]) -> NDArray[np.int64]:
    try:
        return np.array(values, np.int64)
    except (TypeError, ValueError, OverflowError):
        return np.array([integer(value) for value in values], np.int64)


def integer(value: Any) -> int:
    """What a stranger wrote, as a number that fits; NONE where it is none."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return NONE
    return number if 0 <= number < 1 << 62 else NONE
