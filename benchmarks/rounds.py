"""Interleaved rounds: every side once per round, the starting place rotating, so that drift and order fall on
all alike."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from shardwise.measure.subject import clock


class Timed(Protocol):
    """One side on this rank. `prepare` isn't timed: it frees what the last run left and takes the round's
    data."""

    @property
    def name(self) -> str: ...

    def prepare(self, round_: int) -> None: ...

    def run(self) -> None: ...


def interleave(
    sides: Sequence[Timed], rounds: int, warm_ups: int, note: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of this rank per side and round. All ranks of the process group call it with the same sides;
    rounds count from 0, and the warm-ups are rounds too, the first ones, whose times are dropped."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for round_ in range(warm_ups + rounds):
        for place in range(len(sides)):
            side = sides[(place + round_) % len(sides)]
            note(f"round {round_}: {side.name}")
            side.prepare(round_)
            seconds = clock(torch.device("cpu"), side.run)
            if round_ >= warm_ups:
                times[side.name].append(seconds)
    return times
