"""Draft: a machine's constants as they are fitted, each with what it was measured by. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardwise.core.machine import Constant, Points
from shardwise.core.sample import Sample
from shardwise.files.machine_text import constant
from shardwise.predict.curves import Times, residual
from shardwise.predict.search import Vector

ASKED = "measured: what the system says"

Value = float | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What isn't measured but asked of the system. units: multiprocessors; 1 on a CPU. share: of a core that
    each rank got."""

    name: str
    device: str
    about: str
    devices_per_node: int
    memory_bytes: float
    context_bytes: float
    units: int = 1
    share: float = 1.0


@dataclass(slots=True)
class Draft:
    """Constants as they are noted."""

    hardware: Hardware
    constants: list[Constant] = field(default_factory=list)

    def note(self, path: str, value: Value, unit: str, source: str, fitted: str | None = None) -> None:
        self.constants.append(constant(path, value, unit, source, fitted))

    def note_fit(
        self, path: str, what: str, count: int, error: float, values: Mapping[str, tuple[Value, str]]
    ) -> None:
        """values: name -> (value, unit), fitted together to `count` samples of `what`. error: the median
        residual."""
        source = f"measured: {what}, {count} samples, median residual {error:.1%}"
        if self.hardware.share < 0.995 and not path.startswith("links"):
            source += f"; a rank got {self.hardware.share:.0%} of its core"
        for name, (value, unit) in values.items():
            self.note(f"{path}.{name}", value, unit, source, f"the {count} samples of {what}")

    def note_curve(self, path: str, what: str, times: Times, points: Points, unit: str) -> None:
        self.note_fit(path, what, len(times), residual(times, points), {"points": (points, unit)})


def columns(samples: Sequence[Sample], *names: str) -> list[Vector]:
    return [np.array([getattr(sample, name) for sample in samples], np.float64) for name in names]
