"""A profiled run in numbers per step, and two of them side by side. Nouns and their arithmetic; profiles/
fills them.

All times are nanoseconds per step of one rank: means over the run's (rank, step) windows. The books balance:

    sum of the lines  -  time in which several of them ran at once  =  busy time
    busy time + idle time = step
"""

from dataclasses import dataclass
from enum import StrEnum

from shardwise.core.parts import Parts
from shardwise.core.waiting import Loss, Sharing


@dataclass(frozen=True, slots=True)
class Use:
    """How often per step, and how long in all."""

    count: float = 0.0
    ns: float = 0.0

    def __add__(self, other: "Use") -> "Use":
        return Use(self.count + other.count, self.ns + other.ns)

    def per(self, steps: int) -> "Use":
        return Use(self.count / steps, self.ns / steps)


@dataclass(frozen=True, slots=True, order=True)
class Work:
    """What a kernel is known by: its kind, the CPU op (of a collective: the module) that called for it with
    the shapes that went in, and its name without templates.

    of_class: matmul, norm, ...: what unlike kernels for the same thing have in common. is_copy: something
    only moves or is laid out anew.
    """

    kind: str
    op: str
    shapes: str
    name: str
    of_class: str
    is_copy: bool


@dataclass(frozen=True, slots=True)
class CollectiveUse:
    """Collectives of one op that one module asked for ("layers.*.attention"; "" where that isn't known), per
    step of one rank. waiting, transfer: None where they can't be told apart.

    late: (rank, share of the waiting that it caused, what it was doing most) of the rank that caused the
    most.
    """

    op: str
    origin: str
    use: Use
    waiting_ns: float | None
    transfer_ns: float | None
    bus_bytes_per_s: float | None
    late: tuple[int, float, str] | None

    @property
    def is_bound(self) -> bool:
        return self.op == "all_to_all"


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU work per step of one rank: ops, the time they take without those inside them, and launches. by_op:
    name -> Use (self time)."""

    ops: Use
    launches: Use
    by_op: tuple[tuple[str, Use], ...]


@dataclass(frozen=True, slots=True)
class StepOfRank:
    """One (rank, step) window."""

    rank: int
    step: int | None
    length_ns: int
    parts: Parts


@dataclass(frozen=True, slots=True)
class RunProfile:
    """One run. too_fast: collectives whose bus bandwidth is above link_bytes_per_s, what the device's links
    carry. parts: the mean window. lines_ns: all work, summed; busy_ns: its union. without_kernel: launches
    that left no kernel."""

    label: str
    facts: tuple[tuple[str, str], ...]
    ranks: tuple[int, ...]
    steps: tuple[StepOfRank, ...]
    has_device: bool
    parts: Parts
    communication_ns: float
    overlap_ns: float
    lines_ns: float
    busy_ns: float
    work: tuple[tuple[Work, Use], ...]
    collectives: tuple[CollectiveUse, ...]
    cpu: CpuUse
    sharing: Sharing
    link_bytes_per_s: float | None
    too_fast: int
    losses: tuple[Loss, ...]
    without_kernel: tuple[int, int]
    schema_version: int = 1

    @property
    def step_ns(self) -> float:
        return self.parts.total_ns

    @property
    def at_once_ns(self) -> float:
        """Time that the lines count more than once, for several ran at once."""
        return self.lines_ns - self.busy_ns

    @property
    def overlap_share(self) -> float | None:
        return self.overlap_ns / self.communication_ns if self.communication_ns else None


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of a picture's row. part: a field of Parts ("exposed_waiting"), or "communication"."""

    part: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One rank: what the step is made of, and below it all communication, hidden or not."""

    rank: int
    parts: tuple[Bar, ...]
    communication: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class StepPicture:
    """One step of a run on its ranks, at a resolution that a page can draw; times since its start."""

    label: str
    step: int | None
    length_ns: int
    rows: tuple[PictureRow, ...]
    ranks_left_out: int


class Matched(StrEnum):
    """How well two lines are known to be the same thing."""

    KERNEL = "op, shapes and name"
    OP = "op and shapes"
    MODULE = "module"
    NAME = "name"
    CLASS = "class"
    FIRST = "only in the first"
    SECOND = "only in the second"


@dataclass(frozen=True, slots=True)
class Line:
    """The same work in two runs. names: of the kernels behind it, first run's and second run's."""

    matched: Matched
    kind: str
    what: str
    shapes: str
    first: Use
    second: Use
    first_names: tuple[str, ...]
    second_names: tuple[str, ...]
    is_copy: bool

    @property
    def delta_ns(self) -> float:
        return self.second.ns - self.first.ns


@dataclass(frozen=True, slots=True)
class Difference:
    """second against first. lines: all work, largest change first. verdict: in words."""

    first: RunProfile
    second: RunProfile
    lines: tuple[Line, ...]
    cpu_lines: tuple[tuple[str, Use, Use], ...]
    verdict: tuple[str, ...]
    schema_version: int = 1

    @property
    def parts_delta(self) -> Parts:
        return self.second.parts - self.first.parts

    @property
    def lines_delta_ns(self) -> float:
        return self.second.lines_ns - self.first.lines_ns

    @property
    def at_once_delta_ns(self) -> float:
        return self.second.at_once_ns - self.first.at_once_ns

    @property
    def busy_delta_ns(self) -> float:
        return self.second.busy_ns - self.first.busy_ns

    @property
    def step_delta_ns(self) -> float:
        return self.second.step_ns - self.first.step_ns

    @property
    def copies(self) -> tuple[Line, ...]:
        """Copies and layouts that one run does more often than the other."""
        return tuple(
            line for line in self.lines if line.is_copy and abs(line.second.count - line.first.count) > 1e-9
        )
