"""Why a run failed: of all the ranks that ended badly, which did so first, and what to tell the user. Pure;
knows nothing of processes.

When one rank dies, the others soon fail as well, on the connection they lost. So the most telling end wins,
then the earliest: a signal that nobody here sent; an error of the rank's own; an abort or an exit without a
word; a lost connection.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.core import errors

# What gloo and the store say when the other side is gone (gloo/transport/tcp/pair.cc and the system's own
# texts).
_LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
)


def is_of_lost_connection(message: str) -> bool:
    """Whether an error's text only says that another rank is gone."""
    return any(text in message for text in _LOST_CONNECTION)


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception in a rank: its class names from the most special to the most general, and its text."""

    class_names: tuple[str, ...]
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        return cls(tuple(ancestor.__name__ for ancestor in type(error).__mro__), str(error))

    @property
    def lost_connection(self) -> bool:
        return is_of_lost_connection(self.message)

    def as_shardwise_error(self) -> errors.ShardwiseError | None:
        """The same error again, if it was one that Shardwise raised on purpose."""
        for name in self.class_names:
            known = getattr(errors, name, None)
            if isinstance(known, type) and issubclass(known, errors.ShardwiseError):
                return known(self.message)
        return None

    def __str__(self) -> str:
        return f"{self.class_names[0]}: {_first_line(self.message)}".removesuffix(": ")


@dataclass(frozen=True, slots=True)
class BadEnd:
    """How one rank failed: its exception, or an exit code without a result (a signal is negative)."""

    rank: int
    time_s: float
    failure: Failure | None
    exit_code: int | None

    def __post_init__(self) -> None:
        assert self.failure is not None or self.exit_code is not None

    @property
    def is_killed(self) -> bool:
        """By a signal or a crash. Not SIGABRT: so PyTorch also ends a rank whose peer is gone."""
        code = self.exit_code or 0
        return self.failure is None and code < 0 and -code != signal.SIGABRT

    @property
    def _weight(self) -> int:
        if self.is_killed:
            return 0
        if self.failure is None:
            return 2
        return 3 if self.failure.lost_connection else 1


def first_cause(ends: list[BadEnd]) -> BadEnd:
    return min(ends, key=lambda end: (end._weight, end.time_s))


def error_for(end: BadEnd, *, world_size: int, note: str | None, log: str | None) -> errors.ShardwiseError:
    """The one line for the user. note: what the rank was at; log: the path of its output, if it wrote any."""
    during = f' during "{_first_line(note)}"' if note else ""
    others = " The other ranks were stopped." if world_size > 1 else ""
    output = f" Its output: {log}" if log else ""
    if end.failure is not None:
        return end.failure.as_shardwise_error() or errors.RunError(
            f"rank {end.rank} failed: {end.failure}{during}.{output}"
        )
    assert end.exit_code is not None
    if end.exit_code < 0:
        number = -end.exit_code
        hint = " If memory ran out, use a smaller --batch or --seq." if number == signal.SIGKILL else ""
        return errors.RunError(
            f"rank {end.rank} was killed by {_signal_name(number)} (signal {number}){during}."
            f"{others}{hint}{output}"
        )
    return errors.RunError(
        f"rank {end.rank} ended with exit code {end.exit_code} and no result{during}.{others}{output}"
    )


@dataclass(frozen=True, slots=True)
class Silence:
    """One rank in a run where nothing happens any more."""

    is_ready: bool
    is_done: bool
    stopped_by: int | None
    note: str | None

    def __str__(self) -> str:
        stopped = f"stopped by {_signal_name(self.stopped_by)}" if self.stopped_by else None
        if self.is_done:
            return "done"
        if not self.is_ready:
            return stopped or "hasn't joined the others"
        at = f'last at "{_first_line(self.note)}"' if self.note else "no note yet"
        return f"{stopped}, {at}" if stopped else at


def stall_error(ranks: Mapping[int, Silence], *, silent_s: float) -> errors.StalledError:
    """One line that names every rank's state; ranks in the same state share a mention."""
    by_state: dict[str, list[int]] = {}
    for rank, silence in sorted(ranks.items()):
        by_state.setdefault(str(silence), []).append(rank)
    states = "; ".join(f"{_ranks(members)}: {state}" for state, members in by_state.items())
    return errors.StalledError(
        f"nothing was heard from any rank for {silent_s:g} s, so they were stopped ({states}). "
        "If the work needs longer, raise the timeout."
    )


def hung_error(rank: int, *, note: str | None, silent_s: float) -> errors.StalledError:
    """One line of a rank that ends itself."""
    at = f'last at "{_first_line(note)}"' if note else "no note yet"
    return errors.StalledError(
        f"rank {rank} hung: nothing moved in it for {silent_s:g} s, so it ended itself ({at}). If the work "
        "needs longer, raise the timeout."
    )


def _ranks(members: list[int]) -> str:
    return f"rank {members[0]}" if len(members) == 1 else f"ranks {', '.join(map(str, members))}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a signal"


def _first_line(text: str | None) -> str:
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "").rstrip(".")
