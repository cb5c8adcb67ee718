"""How long ranks wait in a collective for the last of them, where the machine says how far apart they come
(core/machine.py: Spread).

    variance   of when a rank comes, against the others of a group: what it has gathered since the group last
               met. Work adds work_s^2 a second, each collective collective_s^2
    waiting    of a rank on average, until the last has come: M(n) x the deviation, n being the group's ranks
               and M(n) the expected maximum of n normal variates (core/order_statistics.py)
    after it   the group's ranks are together. Against ranks of other groups each is now as late as the last
               of its own group, and the maximum of n varies less than one variate: V(n) of its variance
    beside     compute (FSDP's all-gathers): ranks that come while the stream still has other transfers, or
               within what the transfer leaves until its result is needed, delay nobody. A rank may stay ahead
               of others by as much as that is. An all-gather is called for where its layer's run says
               (predict/streams.py), so ranks are as far apart as they were there. A reduce-scatter, for which
               nothing waits before the backward ends, makes nobody wait but the last one; of several
               micro-batches not that one either, since the next one's forward runs beside it

Work is what the compute stream or the host has behind it, whichever is further. A step's first micro-batch
finds ranks as the step before left them, the others as the micro-batch before did; what stands for all is
their mean. For the step's end (replicas that sum their gradients once) all micro-batches' variance counts.

What this file does not know: a device that is always slower than others; that a late rank's pass comes late
to the next stage of a pipeline; ranks of several groups that meet at once. Beside ranks drawn by chance it is
within a tenth; of transfers that run one behind the other it counts a fifth to a third too little
(tests/unit/test_predict_waiting.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardwise.core.collective import CollectiveKind
from shardwise.core.machine import Machine, Spread
from shardwise.core.mesh import axes_in
from shardwise.core.order_statistics import expected_maximum, variance_of_maximum
from shardwise.core.prediction import Setup, Term
from shardwise.core.program import BACKWARDS, Collective
from shardwise.predict.streams import beside_layers, is_gather, needed_by, run, sums_of_replicas
from shardwise.predict.work import Seconds, Work

Apart = dict[str, float]
"""By group: the variance with which its ranks have come apart, in seconds squared."""

_PAIRWISE = (CollectiveKind.SEND, CollectiveKind.RECV)


@dataclass(frozen=True, slots=True)
class _Slack:
    """Seconds of a collective beside the layers, where all ranks are on time: what its stream is busy for
    after it was called for; and what is left from its end until its result is needed. early: it was called
    for when what runs before it began."""

    before_s: float
    after_s: float
    early: bool = False


_NONE = _Slack(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Waiting:
    """sizes: ranks of each group that collectives go over."""

    spread: Spread
    sizes: Mapping[str, int]

    def in_step(
        self, passes: Sequence[Work], end: Work, micro_batches: int
    ) -> tuple[tuple[Work, ...], Apart]:
        """A micro-batch's passes with what ranks wait in them, the mean over all of a step; and how far
        apart ranks are after the last."""
        tail = micro_batches == 1
        _, start = self.of([end], dict.fromkeys(self.sizes, 0.0))
        first, after_first = self.of(passes, start, tail=tail)
        later, after_second = self.of(passes, after_first, tail=tail)
        share = 1 / micro_batches
        mean = tuple(
            replace(one, waits_s=share * one.waits_s + (1 - share) * other.waits_s)
            for one, other in zip(first, later, strict=True)
        )
        # groups that met in each micro-batch are as they were, others come apart by what each adds
        more = micro_batches - 1
        apart = {
            name: variance + more * max(0.0, after_second[name] - variance)
            for name, variance in after_first.items()
        }
        return mean, apart

    def at_end(self, last: Work, end: Work, apart: Apart) -> tuple[Work, Work]:
        """The last backward and the step's end, ranks being so far apart after it: what is summed beside it
        over replicas waits at its last bucket."""
        apart, waits, slack = dict(apart), last.waits_s.copy(), _slack_of(last, tail=True)
        for row in sums_of_replicas(last):
            group, own = last.axes[int(last.axis[row]) - 1], slack.get(int(row), _NONE)
            if own.before_s < np.inf and self.sizes[group] > 1:
                latest = expected_maximum(self.sizes[group]) * apart[group] ** 0.5
                waits[row] = max(0.0, latest - own.before_s)
                _meet(apart, group, self.sizes[group], own.after_s)
        (end,), _ = self.of([end], apart)
        return replace(last, waits_s=waits), end

    def of(
        self, passes: Sequence[Work], apart: Apart, *, tail: bool = False
    ) -> tuple[tuple[Work, ...], Apart]:
        """Passes that follow one another, with what ranks wait in them, from a state on, and the state
        afterwards. tail: nothing runs beside a backward's last reduce-scatter."""
        waited = []
        for work in passes:
            with_waits, apart = self._pass(work, apart, tail=tail)
            waited.append(with_waits)
        return tuple(waited), apart

    def _pass(self, work: Work, apart: Apart, *, tail: bool) -> tuple[Work, Apart]:
        apart, waits = dict(apart), np.zeros(len(work))
        worked, slack = _worked_s(work), _slack_of(work, tail=tail)
        begun, before = dict(apart), 0.0
        for row in map(int, np.flatnonzero((work.axis > 0) & (work.device_s > 0))):
            group = work.axes[int(work.axis[row]) - 1]
            item = work.item(row)
            assert isinstance(item, Collective)
            meeting = 2 if item.call.kind in _PAIRWISE else self.sizes[group]
            if meeting == 1:
                continue
            self._work(apart, worked[row] - before)
            before = float(worked[row])
            own = slack.get(row, _NONE)
            called = begun[group] if own.early else apart[group]
            waits[row] = max(0.0, expected_maximum(meeting) * called**0.5 - own.before_s)
            _meet(apart, group, meeting, own.after_s)
            if row in slack:
                begun = dict(apart)
        self._work(apart, float(worked[-1]) - before if len(work) else 0.0, collectives=0)
        return replace(work, waits_s=waits), apart

    def _work(self, apart: Apart, seconds: float, collectives: int = 1) -> None:
        for name in apart:
            apart[name] += self.spread.variance(seconds, collectives)


def waiting_of(machine: Machine, setup: Setup, sizes: Mapping[str, int]) -> Waiting | None:
    """None where nobody says how far apart ranks come, or it is switched off."""
    spread = machine.spread if setup.spread_s is None else Spread(setup.spread_s)
    if spread is None or spread == Spread() or Term.WAITING in setup.without:
        return None
    return Waiting(spread, sizes)


def _meet(apart: Apart, group: str, meeting: int, after_s: float) -> None:
    """The group's ranks come together, but for what each may be ahead."""
    stays = min(apart[group], (after_s / expected_maximum(meeting)) ** 2)
    met, inside = apart[group] - stays, set(axes_in(group))
    for name in apart:
        if name == group or inside > set(axes_in(name)):
            apart[name] = min(apart[name], stays)
        else:
            apart[name] -= min(met, apart[name]) * (1 - variance_of_maximum(meeting))


def _worked_s(work: Work) -> Seconds:
    """What a rank has worked when it comes to each row."""
    own = np.where(work.axis == 0, work.device_s, 0.0)
    if work.together:
        return np.cumsum(own + work.host_s)
    further: Seconds = np.maximum(np.cumsum(own), np.cumsum(work.host_s))
    return further


def _slack_of(work: Work, *, tail: bool) -> dict[int, _Slack]:
    """Of the collectives beside the layers, by row."""
    beside = np.zeros(len(work), np.bool_) if work.together else beside_layers(work)
    rows, found = np.flatnonzero(beside), dict[int, _Slack]()
    if not len(rows):
        return found
    placed, backward = run(work.punctual), work.in_phases(*BACKWARDS)
    began_s = free_s = 0.0  # of what runs in order before
    first = 0
    for row in map(int, rows):
        if row > first:
            began_s, free_s = float(placed.start_s[first]), float(placed.end_s[row - 1])
        first = row + 1
        gathers = is_gather(work, row)
        early = gathers and not backward[row]
        called_s = max(began_s if early else free_s, float(placed.issued_s[row]))
        before_s = max(0.0, float(placed.start_s[row]) - called_s)
        users = np.flatnonzero((work.layer[row:] == needed_by(work, row)) & ~beside[row:])
        if gathers and len(users):
            after_s = max(0.0, float(placed.start_s[row + users[0]] - placed.end_s[row]))
            found[row] = _Slack(before_s, after_s, early)
        elif tail and row == rows[-1] and backward[row]:
            found[row] = _Slack(before_s, max(0.0, placed.length_s - float(placed.end_s[row])))
        else:  # nothing waits for it
            found[row] = _Slack(np.inf, np.inf)
    return found
