"""How long a step's phases take on this rank, by the host's clock.

That is their time where the host computes. On a GPU the host only issues them, so there it isn't known; a
profile says it.
"""

import time
from typing import Final

from shardwise.core.program import Phase

PHASES: Final = {
    Phase.FORWARD: "forward",
    Phase.LOSS: "loss",
    Phase.BACKWARD: "backward",
    Phase.REDUCE: "reducing gradients",
    Phase.CLIP: "clipping",
    Phase.OPTIMIZER: "optimizer",
}
"""In words. What is run again in the backward is the backward's."""


class Clock:
    """begin() a step, enter() each phase as it begins, end()."""

    def __init__(self, *, host_computes: bool) -> None:
        self._is_on = host_computes
        self._now: Phase | None = None
        self._since_s = 0.0
        self._spent_s = dict.fromkeys(PHASES, 0.0)

    def begin(self) -> None:
        self._now, self._spent_s = None, dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: Phase) -> None:
        self._book()
        self._now = phase

    def end(self) -> tuple[float, ...]:
        """Seconds of each of PHASES, in order; nothing where they aren't known."""
        self._book()
        self._now = None
        return tuple(self._spent_s.values()) if self._is_on else ()

    def _book(self) -> None:
        now_s = time.perf_counter()
        if self._now is not None:
            self._spent_s[self._now] += now_s - self._since_s
        self._since_s = now_s
