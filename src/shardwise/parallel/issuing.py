"""Who wants the collective that runs now: the native engine says it (`issued`), and a tracer that sees the
collective below, at the dispatcher, asks (`issuing`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from shardwise.core.collective import CollectiveKind, Origin
from shardwise.torch_private import is_profiling


@dataclass(frozen=True, slots=True)
class Sends:
    """What a rank sends to others where a router decides: at most, whatever it chose, and on average. In
    rows, or in bytes."""

    most: int
    mean: float


@dataclass(frozen=True, slots=True)
class Issue:
    """A collective that is being issued: for whom, and whether its splits depend on the data, not on shapes
    alone. sends: in bytes, where token ids alone don't tell. reason: why, where the placements don't say
    it."""

    origin: Origin
    by_data: bool
    sends: Sends | None = None
    reason: str | None = None


_issuing: ContextVar[Issue | None] = ContextVar("issuing", default=None)


def issuing() -> Issue | None:
    """The native engine's collective that runs now, in this thread; None outside of one."""
    return _issuing.get()


@contextmanager
def labelled(kind: CollectiveKind, origin: Origin) -> Iterator[None]:
    with issued(kind, Issue(origin, by_data=False)):
        yield


@contextmanager
def issued(kind: CollectiveKind, issue: Issue) -> Iterator[None]:
    token = _issuing.set(issue)
    try:
        if is_profiling():
            # Kineto writes names as they are: a quote would break its JSON
            label = f"shardwise.{kind}|{issue.origin}".replace('"', "'")
            with torch.profiler.record_function(label):
                yield
        else:
            yield
    finally:
        _issuing.reset(token)
