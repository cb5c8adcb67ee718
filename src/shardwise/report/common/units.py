"""Numbers as people read them: three significant digits and a unit. Takes SI (bytes, seconds), gives text.

Bytes are binary (1 KiB = 1024 B, IEC 80000-13); seconds and counts are decimal. An absent number is `absent`,
in words; a number that is not finite says so (NaN, ∞). What this file does not know: what a number means.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shardwise.core.measurement import Ratio

NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's name and how many SI units it holds: Unit("ms", 0.001)."""

    name: str
    size: float


BYTE_UNITS = (
    Unit("B", 1.0),
    Unit("KiB", 2.0**10),
    Unit("MiB", 2.0**20),
    Unit("GiB", 2.0**30),
    Unit("TiB", 2.0**40),
    Unit("PiB", 2.0**50),
)
SECOND_UNITS = (Unit("ns", 1e-9), Unit("µs", 1e-6), Unit("ms", 1e-3), Unit("s", 1.0))
FLOP_UNITS = tuple(
    Unit(f"{prefix}FLOP", 1e3**power) for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E"))
)
COUNT_UNITS = (Unit("", 1.0), Unit("k", 1e3), Unit("M", 1e6), Unit("B", 1e9), Unit("T", 1e12))


def unit_for(values: Iterable[float | None], units: tuple[Unit, ...]) -> Unit:
    """The unit in which the largest finite value reads best: the largest unit of which it holds at least
    one."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if largest == 0.0:
        return units[0]
    step = units[1].size / units[0].size
    # 0.9995 of a unit would round to 1000 of the next smaller one
    holding = [unit for unit in units if round_to_three(largest / unit.size * step) >= step]
    return holding[-1] if holding else units[0]


def round_to_three(value: float) -> float:
    """To three significant digits; whole numbers from 1000 on keep all of theirs."""
    return float(round(value)) if abs(value) >= 1000 else float(f"{value:.3g}")


def format_number(value: float) -> str:
    """`4.00`, `40.0`, `400`, `1023`; NaN and ∞ by name."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) >= 999.5:
        return f"{value:.0f}"
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def format_bytes(value: float | None, absent: str = NOT_MEASURED) -> str:
    """`0 B`, `512 B`, `1.50 MiB`, `2.00 GiB`."""
    if value is None:
        return absent
    unit = unit_for((value,), BYTE_UNITS)
    whole = unit.size == 1.0 and math.isfinite(value)
    return f"{round(value) if whole else format_number(value / unit.size)} {unit.name}"


def format_seconds(value: float | None, absent: str = NOT_MEASURED) -> str:
    """`85.0 µs`, `183 ms`, `1.20 s`."""
    if value is None:
        return absent
    unit = unit_for((value,), SECOND_UNITS)
    return f"{format_number(value / unit.size)} {unit.name}" if value else "0 s"


def format_count(value: float | None, absent: str = NOT_MEASURED) -> str:
    """`812`, `44.7 k`, `8.03 B` (billion)."""
    if value is None:
        return absent
    if isinstance(value, int) and abs(value) < 1000:
        return str(value)
    unit = unit_for((value,), COUNT_UNITS)
    return f"{format_number(value / unit.size)} {unit.name}".rstrip()


def format_flops(value: float | None, absent: str = NOT_MEASURED) -> str:
    """`17.6 TFLOP`: operations, not a speed."""
    if value is None:
        return absent
    unit = unit_for((value,), FLOP_UNITS)
    return f"{format_number(value / unit.size)} {unit.name}" if value else "0"


def format_share(share: float) -> str:
    """`50 %`, `99.997 %`: as many digits as it takes not to call a part all or nothing."""
    if share in (0.0, 1.0) or not math.isfinite(share):
        return f"{format_number(share * 100).removesuffix('.')} %"
    texts = (f"{share * 100:.{digits}f}" for digits in range(1, 12))
    text = next((text for text in texts if float(text) not in (0.0, 100.0)), f"{share * 100!r}")
    return f"{text.rstrip('0').rstrip('.') if '.' in text and 'e' not in text else text} %"


def format_ratio(value: float | None, absent: str = NOT_MEASURED) -> str:
    """Three decimals, since 1 % matters and 0.1 % can be seen: `0.842`; three digits from 10 on."""
    if value is None:
        return absent
    return f"{value:.3f}" if math.isfinite(value) and abs(value) < 9.9995 else format_number(value)


def format_interval(ratio: Ratio | None, absent: str = NOT_MEASURED) -> str:
    """`0.842 [0.811, 0.874]`."""
    if ratio is None:
        return absent
    return f"{format_ratio(ratio.median)} [{format_ratio(ratio.low)}, {format_ratio(ratio.high)}]"


def format_confidence(confidence: float) -> str:
    """`95 %`, `97.9 %`."""
    return f"{round(confidence * 100, 1):g} %"


def format_error(value: float | None, absent: str = NOT_MEASURED) -> str:
    """A relative error: `2.1e-07`; `0` if there is none at all."""
    if value is None:
        return absent
    if not math.isfinite(value):
        return format_number(value)
    return f"{value:.1e}" if value else "0"


@dataclass(frozen=True, slots=True)
class Format:
    """How the values of a column read, and the unit in which they are given."""

    write: Callable[[Any], str]
    unit: str = ""

    def text(self, value: object) -> str:
        """An absent value is nothing at all: a cell that has words for it says them."""
        return "" if value is None else self.write(value)


TEXT = Format(str)
NUMBER = Format(str)
BYTES = Format(format_bytes, "bytes")
SECONDS = Format(format_seconds, "s")
COUNT = Format(format_count)
FLOPS = Format(format_flops, "FLOP")
RATIO = Format(format_ratio)
PERCENT = Format(lambda share: f"{100 * share:.1f} %", "share")
ERROR = Format(format_error, "relative")
BAR = Format(lambda share: "█" * round(20 * share) or ("▏" if share else ""))
"""Of a share of the longest: characters, which only a terminal shows."""
