"""Whether the steps of a run have become slower: than they were themselves, or than they were predicted.

Recent is the (low) median of the last RECENT steps. Usual is the least that the median of the PAST steps
before them has been, so a run that slows down little by little is seen too. A run is slower where recent >
(1 + share) usual, and as it was once recent <= (1 + share / 2) usual. One slow step moves neither median; a
step that ran beside a save or a profiler counts in none. It doesn't know why: only which term of the step
grew most, where the terms were measured.
"""

from collections import deque
from collections.abc import Callable, Iterable
from statistics import median_low

from shardwise.core.training import StepRecord

RECENT, PAST, LEAST_PAST = 8, 64, 16
WARM_UP = 3
"""First steps after the ranks' start, which allocate and are slow."""
_MOST_OF_IT = 0.5
"""The share of the growth from which a term is named as its cause."""
_TEXT = "waiting for text"
_ASK = "--profile-every N says which rank is late, and in what"


class Pace:
    """take() each step of one start of the ranks. share: by how much longer a step is told. predicted_s: a
    step's on `machine`; None where nothing was predicted."""

    def __init__(self, share: float, predicted_s: float | None = None, machine: str = "") -> None:
        self._share, self._predicted_s, self._machine = share, predicted_s, machine
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._past: deque[StepRecord] = deque(maxlen=PAST)
        self._usual: tuple[float, dict[str, float]] | None = None
        self._seen = 0
        self._is_slower = self._is_over = False

    def take(self, record: StepRecord) -> str | None:
        """A line where the run has become slower than it was, or than predicted, or is as it was again; each
        is said once."""
        self._seen += 1
        if self._seen <= WARM_UP or record.beside is not None:
            return None
        if len(self._recent) == RECENT and not self._is_slower:
            self._past.append(self._recent[0])
        self._recent.append(record)
        if len(self._recent) < RECENT:
            return None
        now_s = _typical(self._recent)
        return self._against_past(record.step, now_s) or self._against_prediction(record.step, now_s)

    def _against_past(self, step: int, now_s: float) -> str | None:
        if len(self._past) < LEAST_PAST:
            return None
        past_s = _typical(self._past)
        if self._usual is None or past_s < self._usual[0]:
            self._usual = past_s, _terms(self._past)
        usual_s, usual = self._usual
        if self._is_slower:
            if now_s > (1 + self._share / 2) * usual_s:
                return None
            self._is_slower = False
            return f"step {step}: steps take {_time(now_s)} again."
        if now_s <= (1 + self._share) * usual_s:
            return None
        self._is_slower = True
        grown = self._grown(usual, now_s - usual_s)
        return f"step {step}: steps take {_time(now_s)}, {now_s / usual_s:.2f} times what they took. {grown}"

    def _against_prediction(self, step: int, now_s: float) -> str | None:
        if self._predicted_s is None:
            return None
        times = now_s / self._predicted_s
        if self._is_over:
            self._is_over = times > 1 + self._share / 2
            return None
        if times <= 1 + self._share:
            return None
        self._is_over = True
        text_s = _median(each.data_s for each in self._recent)
        waits = f" {_time(text_s)} of it {_TEXT}{self._late()}." if text_s > _MOST_OF_IT * now_s else ""
        return (
            f"step {step}: steps take {_time(now_s)}, {times:.2f} times what was predicted for "
            f"{self._machine}, {_time(self._predicted_s)}.{waits or f' {_ASK}.'}"
        )

    def _grown(self, usual: dict[str, float], growth_s: float) -> str:
        """Which term it was, in a sentence."""
        now = _terms(self._recent)
        known = {name: seconds - usual.get(name, 0.0) for name, seconds in now.items()}
        name = max(known, key=lambda each: known[each])
        if known[name] > _MOST_OF_IT * growth_s:
            change = f"from {_time(usual.get(name, 0.0))} to {_time(now[name])}"
            if name == _TEXT:
                return f"The time {_TEXT} grew {change}{self._late()}."
            return f"Its {name} grew {change}; {_ASK}."
        if len(known) == 1:
            return f"It isn't {_TEXT}; {_ASK}."
        return f"No one part grew most; {_ASK}."

    def _late(self) -> str:
        """The rank that waited longest for text in most of the recent steps."""
        ranks = [each.data_rank for each in self._recent if each.data_rank is not None]
        most = max(set(ranks), key=ranks.count, default=None)
        return f", most on rank {most}" if most is not None and 2 * ranks.count(most) > RECENT else ""


def _typical(records: Iterable[StepRecord]) -> float:
    return _median(each.seconds for each in records)


def _terms(records: Iterable[StepRecord]) -> dict[str, float]:
    """Medians of what a step's time is known to be made of."""
    records = tuple(records)
    names = {name for each in records for name in each.phases_s or {}}
    found: dict[str, Callable[[StepRecord], float]] = {_TEXT: lambda each: each.data_s}
    for name in sorted(names):
        found[name] = lambda each, name=name: (each.phases_s or {}).get(name, 0.0)  # type: ignore[misc]
    return {name: _median(map(of, records)) for name, of in found.items()}


def _median(values: Iterable[float]) -> float:
    return median_low(values)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
