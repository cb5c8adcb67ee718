"""Collectives as all their ranks saw them: who came last, how long the others waited, how long the data took.
Nouns and their arithmetic.

For one collective over ranks r, each in it during [s_r, e_r) on a common clock, A = max s_r is when the last
rank arrived:

    waiting_r  = clip(A - s_r, 0, e_r - s_r)
    transfer_r = (e_r - s_r) - waiting_r
    transfer   = median e_r - A

Ends of symmetric collectives (all-reduce, all-gather, reduce-scatter, all-to-all) are taken for simultaneous;
of the others there is no split. In an all-to-all, pairs that are there early move data before A: transfer is
a lower bound, and the bandwidth an upper one. Bus bandwidth: wire bytes by core/collective.py's formulas over
transfer, as nccl-tests counts it.
"""

from dataclasses import dataclass
from statistics import median_low


@dataclass(frozen=True, slots=True)
class Member:
    """One rank's part in a collective, on the common clock. span: in the rank's Timeline."""

    rank: int
    span: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Blame:
    """What the last rank did between the first rank's arrival and its own (window_ns): what most, and for how
    long of it.

    is_cpu: its device had nothing to do most of that time, and this is what its CPU was in.
    """

    doing: str
    busy_ns: int
    window_ns: int
    is_cpu: bool = False


@dataclass(frozen=True, slots=True)
class SharedCollective:
    """One collective on all its ranks. origin: the module that asked, or "". step: of the profile, or None.
    full_bytes, wire_bytes: None where the files don't say."""

    op: str
    origin: str
    group: str
    ranks: tuple[int, ...]
    step: int | None
    members: tuple[Member, ...]
    full_bytes: int | None
    wire_bytes: float | None
    blame: Blame | None = None

    @property
    def arrival_ns(self) -> int:
        return max(member.start_ns for member in self.members)

    @property
    def last_rank(self) -> int:
        return max(self.members, key=lambda member: member.start_ns).rank

    @property
    def is_possible(self) -> bool:
        """No rank can leave before the last has come; else the match or a clock is wrong."""
        return min(member.end_ns for member in self.members) >= self.arrival_ns

    @property
    def transfer_ns(self) -> int:
        return median_low([member.end_ns for member in self.members]) - self.arrival_ns

    def waiting_ns(self, member: Member) -> int:
        return max(0, min(self.arrival_ns - member.start_ns, member.end_ns - member.start_ns))

    @property
    def total_waiting_ns(self) -> int:
        return sum(self.waiting_ns(member) for member in self.members)

    @property
    def total_ns(self) -> int:
        return sum(member.end_ns - member.start_ns for member in self.members)

    @property
    def longest_wait_ns(self) -> int:
        return max(self.waiting_ns(member) for member in self.members)

    @property
    def bus_bytes_per_s(self) -> float | None:
        """None where bytes aren't known, or no time passed after the last arrival."""
        if self.wire_bytes is None or self.transfer_ns <= 0:
            return None
        return self.wire_bytes / (self.transfer_ns / 1e9)

    @property
    def is_bound(self) -> bool:
        """Whether transfer is a lower bound only."""
        return self.op == "all_to_all"


@dataclass(frozen=True, slots=True)
class Clock:
    """What was taken off a rank's times. spread_ns: in half of its collectives, first and last end of all
    ranks then lie no further apart; None: no common collective."""

    rank: int
    offset_ns: int | None
    spread_ns: int | None
    collectives: int


@dataclass(frozen=True, slots=True)
class Loss:
    """What a file had and could not be read, or was left out: how many, what, and an example."""

    count: int
    what: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Collectives that aren't split: how many (sets, or calls where no set could be made), and why."""

    count: int
    why: str


@dataclass(frozen=True, slots=True)
class Sharing:
    """What could be said of a run's collectives over its ranks."""

    collectives: tuple[SharedCollective, ...]
    clocks: tuple[Clock, ...]
    refused: tuple[Refused, ...]

    @property
    def total_ns(self) -> int:
        return sum(each.total_ns for each in self.collectives)

    @property
    def waiting_ns(self) -> int:
        return sum(each.total_waiting_ns for each in self.collectives)
