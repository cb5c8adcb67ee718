"""What a step's window is made of: core/decomposition.py says what each part means and how it is found."""

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Parts:
    """Nanoseconds of a window; they add up to its length."""

    compute_ns: float = 0
    exposed_transfer_ns: float = 0
    exposed_communication_ns: float = 0
    exposed_waiting_ns: float = 0
    exposed_copy_ns: float = 0
    cpu_bound_idle_ns: float = 0
    other_idle_ns: float = 0

    @property
    def total_ns(self) -> float:
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def exposed_ns(self) -> float:
        """Exposed communication, whichever way it splits."""
        return self.exposed_transfer_ns + self.exposed_communication_ns + self.exposed_waiting_ns

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __sub__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, part.name) - getattr(other, part.name) for part in fields(self)))

    def scaled(self, factor: float) -> "Parts":
        return Parts(*(getattr(self, part.name) * factor for part in fields(self)))


@dataclass(frozen=True, slots=True)
class Part:
    """One of them: a field of Parts without its unit, what it is called, and what it means."""

    key: str
    label: str
    meaning: str

    def ns(self, parts: Parts) -> float:
        return float(getattr(parts, f"{self.key}_ns"))


PARTS = (
    Part("compute", "compute", "kernels that are neither communication nor copies"),
    Part(
        "exposed_waiting",
        "exposed waiting for ranks",
        "in a collective before its last rank came, with no compute beside it",
    ),
    Part(
        "exposed_transfer",
        "exposed transfer",
        "in a collective after its last rank came, with no compute beside it",
    ),
    Part(
        "exposed_communication",
        "exposed communication, not split",
        "in a collective of which it isn't known when the last rank came, with no compute beside it",
    ),
    Part("exposed_copy", "exposed copies", "copies and fills with nothing beside them"),
    Part(
        "cpu_bound_idle",
        "idle: the CPU was behind",
        "nothing runs, and the next work had not been launched yet",
    ),
    Part("other_idle", "other idle", "nothing runs, though the next work had been launched"),
)
"""In the order in which a reader meets them."""


def parts_of(found: Iterable[Parts]) -> tuple[Part, ...]:
    """The parts that some of them have."""
    these = tuple(found)
    return tuple(part for part in PARTS if any(part.ns(parts) for parts in these))
