"""What a machine file's constants are: their keys, the nouns' attributes that hold them, their units, and the
ranges in which they are plausible. What a file's tables are: files/machine_file.py."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a constant is: its units with their size in SI, and the range in which it is plausible, in SI."""

    units: tuple[tuple[str, float], ...]
    low: float
    high: float
    shared: bool = False  # can be stated per node: must say per which

    def shown(self, value: float) -> str:
        name, size = next(
            ((name, size) for name, size in reversed(self.units) if value >= size), self.units[0]
        )
        return f"{value / size:g} {name}"

    @property
    def plausible(self) -> str:
        return f"Plausible: {self.shown(self.low)} to {self.shown(self.high)}."


_SECONDS = (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0))
_PER_SECOND = (("MB/s", 1e6), ("GB/s", 1e9), ("TB/s", 1e12))
_FLOPS = (("GFLOP/s", 1e9), ("TFLOP/s", 1e12))
_BYTES = (("MB", 1e6), ("MiB", 2.0**20), ("GB", 1e9), ("GiB", 2.0**30))
_ONE = (("1", 1.0),)

CAPACITY = Quantity(_BYTES, 1e8, 4e12, shared=True)
HELD = Quantity(_BYTES, 0.0, 2e10, shared=True)
BANDWIDTH = Quantity(_PER_SECOND, 1e7, 5e13, shared=True)
LINK_BANDWIDTH = Quantity(_PER_SECOND, 1e7, 4e12, shared=True)
COLLECTIVE_RATE = Quantity(_PER_SECOND, 1e7, 4e12)
POWER = Quantity((("W", 1.0),), 1.0, 20_000.0, shared=True)
PEAK = Quantity(_FLOPS, 1e9, 5e16, shared=True)
RATE = Quantity(_FLOPS, 1e8, 5e16)
START = Quantity(_SECONDS, 0.0, 0.05)
TIME = Quantity(_SECONDS, 0.0, 100.0)
KERNEL_RATE = Quantity(_PER_SECOND, 1e7, 5e13)
ELEMENTS = Quantity((("Gelement/s", 1e9),), 1e7, 1e14)
UNITS = Quantity(_ONE, 1, 100_000)
SHARE = Quantity(_ONE, 0.0, 1.0)
EXTRA_K = Quantity(_ONE, 0.0, 100_000.0)
DEVIATION = Quantity(_SECONDS, 0.0, 10.0)
TOKENS = Quantity((("tokens", 1.0),), 0.0, 1e6)


@dataclass(frozen=True, slots=True)
class Field:
    """A constant of a table: its key there, the attribute of the noun that holds it, and what it is.
    is_needed: else it may be left out, and then is `default`."""

    key: str
    attribute: str
    quantity: Quantity
    is_needed: bool = True
    default: float | None = None


MEMORY = (
    Field("capacity", "memory_bytes", CAPACITY),
    Field("bandwidth", "memory_bytes_per_s", BANDWIDTH),
    Field("context", "context_bytes", HELD),
    Field("workspace", "workspace_bytes", HELD, is_needed=False, default=0.0),
)
CAP = (Field("cap", "power_w", POWER),)
PREDICTIONS = (Field("error", "error", SHARE),)
MATMUL = (
    Field("peak", "peak_flops", PEAK),
    Field("units", "units", UNITS),
    Field("start", "start_s", START),
    Field("extra_k", "extra_k", EXTRA_K),
    Field("group", "group_s", START, is_needed=False, default=0.0),
    Field("unaligned", "unaligned", SHARE, is_needed=False, default=1.0),
)
ATTENTION = (
    Field("forward", "forward_flops", RATE),
    Field("backward", "backward_flops", RATE),
    Field("half_sequence", "half_sequence", TOKENS),
    Field("start", "start_s", START),
)
KERNEL = (
    Field("start", "start_s", START),
    Field("rate", "bytes_per_s", KERNEL_RATE),
    Field("elements", "elements_per_s", ELEMENTS, False, math.inf),
)
LAUNCH = (
    Field("forward", "forward_s", START, False),
    Field("backward", "backward_s", START, False),
    Field("collective", "collective_s", START, False),
    Field("dtensor_forward", "dtensor_forward_s", START, False),
    Field("dtensor_backward", "dtensor_backward_s", START, False),
)
SPREAD = (Field("work", "work_s", DEVIATION), Field("collective", "collective_s", DEVIATION))
LINK = (
    Field("bandwidth", "bytes_per_s", LINK_BANDWIDTH),
    Field("start", "start_s", START, False, 0.0),
    Field("start_per_hop", "start_per_hop_s", START, False, 0.0),
    Field("direct", "direct", UNITS, False, 0.0),
)
COLLECTIVE = (Field("start", "start_s", START), Field("rate", "bytes_per_s", COLLECTIVE_RATE))
