"""What a step's window is made of: core/decomposition.py says what each part means and how it is found."""

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
