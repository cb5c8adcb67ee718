"""What a style shows of its inside while it works, for whoever watches; when nobody does, that costs one look
at a variable."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_watcher: ContextVar[Callable[[str, Tensor], None] | None] = ContextVar("watcher", default=None)


def show(name: str, value: Tensor) -> None:
    """Hands `value` to the watcher, who must not change it."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(name, value)


@contextmanager
def watched_by(watcher: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Styles that run inside, in this thread, call watcher(name, tensor)."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
