"""Values on an axis of a picture, in percent of its length, and the round ones among them. Computes places,
draws nothing."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardwise.report.common.units import Unit, unit_for

# from this ratio of the largest to the smallest on, equal ratios are equal distances
_LOG_FROM = 6.0
# room beside the outermost values, in percent
_ROOM = 4.0
# of a round scale: steps, and how many ticks a reader wants
_STEPS = (1.0, 2.0, 5.0, 10.0)
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Values between low and high, as 0 to 100 percent."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def over(cls, values: Iterable[float]) -> "Scale":
        """Of all values, with room beside them."""
        given = list(values)
        low, high = min(given), max(given)
        is_log = low > 0 and high / low >= _LOG_FROM
        start, end = (math.log(low), math.log(high)) if is_log else (low, high)
        room = (end - start) * _ROOM / 100 or abs(end) * _ROOM / 100 or 1.0
        start, end = start - room, end + room
        return cls(math.exp(start), math.exp(end), True) if is_log else cls(max(start, 0.0), end, False)

    def at(self, value: float) -> float:
        low, high = self._ends
        return 100 * ((math.log(value) if self.is_log else value) - low) / (high - low)

    @property
    def _ends(self) -> tuple[float, float]:
        return (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)

    def round_values(self, units: tuple[Unit, ...]) -> Iterator[float]:
        """Values for ticks, round in their unit."""
        if self.is_log:
            yield from self._round_logs(units)
            return
        unit = unit_for((self.high,), units)
        low, high = self.low / unit.size, self.high / unit.size
        rough = (high - low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * each for each in _STEPS if power * each >= rough * 0.999)
        yield from (unit.size * step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1))

    def _round_logs(self, units: tuple[Unit, ...]) -> Iterator[float]:
        """1, 2 and 5 of each power of ten; 1 and 4 of ten's where those are many."""
        steps = _STEPS[:3] if self.high / self.low < 10.0**3 else (1.0,)
        for unit, larger in zip(units, [*(each.size for each in units[1:]), math.inf], strict=True):
            power = 1.0
            while power * unit.size < min(larger, self.high):
                values = (unit.size * power * step for step in steps)
                yield from (each for each in values if self.low <= each <= self.high and each < larger)
                power *= 10


def ticks(scale: Scale, units: tuple[Unit, ...]) -> Iterator[Tick]:
    """Round values of a scale, with their places and how they read."""
    for value in scale.round_values(units):
        unit = unit_for((value,), units)
        yield Tick(scale.at(value), f"{value / unit.size:.4g} {unit.name}" if value else "0")
