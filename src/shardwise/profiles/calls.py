"""What a rank's collectives were, by their args, their kernels and who called for them: a row each."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, Raw, UnsetType
from numpy.typing import NDArray

from shardwise.core.dtype import DTYPE_BYTES
from shardwise.core.timeline import NONE, Collectives, Group, SpanKind, Spans
from shardwise.profiles import classify
from shardwise.profiles.columns import Numbers, integer
from shardwise.profiles.events import Args, Header

_OURS = re.compile(r"shardwise\.\w+\|([^ (]+)")
_MODULE = re.compile(r"module: (.+)")
_MOST_CALLERS = 64
# what args that a stranger wrote may raise
_ODD = (
    msgspec.DecodeError,
    msgspec.ValidationError,
    RecursionError,
    UnicodeDecodeError,
    TypeError,
    OverflowError,
)
Ranks = dict[str, tuple[int, ...]]


def collectives_of(
    calls: list[tuple[int, Args]], spans: Spans, names: tuple[str, ...], header: Header
) -> tuple[Collectives, tuple[Group, ...], tuple[str, ...]]:
    """(a row for each call, the groups and the names that rows number). calls: (span, args)."""
    numbers = Numbers({name: number for number, name in enumerate(names)})
    groups = Numbers()
    configured = {
        str(group.pg_name): group.ranks for group in header.job.pg_config if group.ranks is not None
    }
    # with more groups, how many ranks gather isn't said
    gathering = header.job.world_size if len(configured) <= 1 else None
    _find_callers([span for span, _ in calls], spans, names)
    rows = []
    for span, args in calls:
        kernel = names[spans.name[span]]
        callers = list(_callers(span, spans, names))
        op = _op(args, kernel, callers)
        elements_in, elements_out, dtype = _elements(args, kernel, op, gathering)
        elements = elements_out if op == "all_gather" else elements_in
        element_bytes = DTYPE_BYTES.get(dtype.lower())
        full_bytes = elements * element_bytes if elements != NONE and element_bytes else NONE
        asked = _module(callers)
        origin = NONE if asked is None else numbers[asked]
        named = (numbers[op], numbers[dtype], origin, groups[_group(args, configured)])
        largest = max(elements_in, elements_out)
        rows.append((span, *named, integer(args.sequence), largest, full_bytes, NONE))
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    dtypes = [*[np.int32] * 5, *[np.int64] * 4]
    arrays: list[NDArray[Any]] = [
        np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)
    ]
    return Collectives(*arrays), tuple(groups), tuple(numbers)


def _find_callers(calls: list[int], spans: Spans, names: tuple[str, ...]) -> None:
    """A backend's ranges in its worker threads begin in the order of the calls: gives each the c10d op that
    called for it as its parent."""
    ranges = np.array([span for span in calls if names[spans.name[span]].startswith("gloo:")], np.int64)
    is_call = [name.startswith("c10d::") and not name.startswith("c10d::barrier") for name in names]
    ops = np.flatnonzero(np.array(is_call, np.bool_)[spans.name] & (spans.kind == SpanKind.OP))
    if len(ops) != len(ranges):
        return
    ops = ops[np.argsort(spans.start_ns[ops], kind="stable")]
    ranges = ranges[np.argsort(spans.start_ns[ranges], kind="stable")]
    if (spans.start_ns[ops] <= spans.start_ns[ranges]).all():
        spans.parent[ranges] = ops


def _callers(span: int, spans: Spans, names: tuple[str, ...]) -> Iterator[str]:
    """Names of the CPU ops and ranges around a collective's launch, from the inside out."""
    at = spans.parent[span]
    for _ in range(_MOST_CALLERS):
        if at == NONE:
            return
        yield names[spans.name[at]]
        at = spans.parent[at]


def _module(callers: list[str]) -> str | None:
    """Which module asked: by the innermost of our own ranges and of modules' ranges around the call."""
    for name in callers:
        asked = _asked(name)
        if asked is not None:
            return asked
    return None


@lru_cache(maxsize=4096)
def _asked(name: str) -> str | None:
    match = _OURS.match(name) or _MODULE.match(name)
    return None if match is None else match[1]


def _op(args: Args, kernel: str, callers: list[str]) -> str:
    """As the args say; else the callers (gloo's reduce-scatter is an all-to-all); else the kernel."""
    said = [] if args.collective is None else [str(args.collective)]
    issuers = [name.partition("|")[0] for name in callers if classify.issues_collective(name)]
    for name in (*said, *(issuer.rpartition(":")[2].rpartition(".")[2] for issuer in issuers)):
        op = classify.collective_op(name)
        if op != classify.UNKNOWN:
            return op
    return classify.collective_op(kernel)


def _elements(args: Args, kernel: str, op: str, gathering: int | None) -> tuple[int, int, str]:
    """(elements in and out, dtype); NONE and "" where they aren't said. gathering: an all-gather's ranks."""
    elements_in, elements_out = integer(args.elements_in), integer(args.elements_out)
    dtype = "" if args.dtype is None else str(args.dtype)
    if elements_in == NONE and kernel.startswith("gloo:"):
        elements_in, dtype = _of_tensors(args)
        if op == "all_gather" and gathering and elements_in != NONE:
            elements_out = elements_in * gathering
    return elements_in, elements_out, dtype


def _of_tensors(args: Args) -> tuple[int, str]:
    """(elements, dtype) of all tensors that a CPU range was given; (NONE, "") where it doesn't say."""
    try:
        shapes = [msgspec.convert(each, list[int]) for each in _decoded(args.dims) or []]
        types = _decoded(args.types)
        if not shapes or not types:
            return NONE, ""
        return sum(int(np.prod(shape, dtype=object)) for shape in shapes), str(types[0])
    except _ODD:
        return NONE, ""


def _group(args: Args, configured: Ranks) -> Group:
    if args.group is None:
        return Group("", next(iter(configured.values())) if len(configured) == 1 else None)
    name = str(args.group)
    return Group(name, configured[name] if name in configured else _listed_ranks(args.group_ranks))


def _listed_ranks(text: Raw | UnsetType) -> tuple[int, ...] | None:
    """Of "[0, 1, 2]", as a string or a list; None where there is none, or where the list was cut short."""
    try:
        value = _decoded(text)
        if isinstance(value, str):
            value = msgspec.json.decode(value)
        return tuple(msgspec.convert(value, list[int]))
    except _ODD:
        return None


def _decoded(raw: Raw | UnsetType) -> Any:
    return None if raw is UNSET else msgspec.json.decode(bytes(raw))
