"""How a verb says how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called with each new phase, or with units of work that are done of a total; left_s: seconds to go, if
    known. text: what is done now and, on a second line, what is found so far (so_far)."""

    def __call__(self, text: str, done: int = 0, total: int = 0, left_s: float | None = None) -> None: ...


def silent(text: str, done: int = 0, total: int = 0, left_s: float | None = None) -> None:
    """Nobody listens."""


def so_far(now: str, best: str) -> str:
    """What is tried now, and the best so far, as the text of a Progress."""
    return f"{now}\nbest so far: {best}"
