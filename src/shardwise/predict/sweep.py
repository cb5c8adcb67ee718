"""What a sweep goes over, and the order of what it found."""

from collections.abc import Iterable
from dataclasses import dataclass

from shardwise.core.sweep import SweepPoint

DATA_AXES = ("fsdp", "dp")


@dataclass(frozen=True, slots=True)
class Split:
    """data_axis: None where there is one data-parallel rank."""

    tp: int
    data_axis: str | None
    data_size: int
    stages: int

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        return (
            ((self.data_axis, self.data_size), ("tp", self.tp))
            if self.data_axis is not None
            else (("tp", self.tp),)
        )


def splits(devices: int, devices_per_node: int, context: int = 1) -> tuple[Split, ...]:
    """All tp x dp or fsdp x stages of `devices`: tp inside a node and dividing it, the rest any divisors. context: ranks that share a sequence
    beside each of them, and reduce gradients with the data-parallel ones."""
    found = []
    for tp in _divisors(devices):
        if tp > devices_per_node or devices_per_node % tp:
            continue
        for stages in _divisors(devices // tp):
            data = devices // tp // stages
            axes: tuple[str | None, ...] = DATA_AXES if data * context > 1 else (None,)
            found += [Split(tp, axis, data, stages) for axis in axes]
    return tuple(found)


def best_first(points: Iterable[SweepPoint]) -> tuple[SweepPoint, ...]:
    """What fits first; each part by throughput, then by memory."""
    return tuple(
        sorted(
            points,
            key=lambda point: (not point.fits, -point.tokens_per_s_per_device, point.memory.device_bytes),
        )
    )


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
