"""Which rank of a profiled step was late, and in what: a RunProfile in one or two lines.

Late is the rank for which the others waited longest, over all collectives of the step in which it came last.
What it was in: the part of its own step that is larger than the other ranks' median by most.
"""

from collections import Counter
from statistics import median_low

from shardwise.core.difference import RunProfile
from shardwise.core.parts import Parts
from shardwise.profiles.diff import ms

_WORTH_SAYING = 0.02
"""Of a step: waiting below it is nobody's fault."""
_SMALL = 0.005
_COLLECTIVE = ("gloo:", "nccl")
"""It came late from another collective, which says nothing of why."""
_ITS_OWN = ("compute", "copies", "idle")
"""What makes a rank late. Waiting and transfer it has from others."""


def late_words(run: RunProfile) -> tuple[str, ...]:
    """What the step is made of, the mean over ranks, and who was late."""
    if run.step_ns <= 0:
        return ()
    shares = ", ".join(
        f"{ns / run.step_ns:.0%} {name}" for name, ns in _named(run.parts) if ns >= _SMALL * run.step_ns
    )
    return f"{ms(run.step_ns)}: {shares}", _late(run)


def _late(run: RunProfile) -> str:
    caused, doing = Counter[int](), Counter[tuple[int, str]]()
    steps = {each.step for each in run.steps}  # not what ran between them
    collectives = [each for each in run.sharing.collectives if each.step in steps]
    for each in collectives:
        caused[each.last_rank] += each.total_waiting_ns
        if each.blame is not None and not each.blame.doing.startswith(_COLLECTIVE):
            doing[each.last_rank, each.blame.doing] += each.total_waiting_ns
    total = sum(caused.values())
    if len(run.ranks) < 2:
        return "One rank alone waits for none."
    if not collectives:
        why = run.sharing.refused[0].why if run.sharing.refused else "there was no collective"
        return f"Which rank was late isn't known: {why}."
    if total < _WORTH_SAYING * run.step_ns * len(run.ranks):
        return "No rank was late: none waited long for another."
    rank, ns = caused.most_common(1)[0]
    most = max(((ns, what) for (who, what), ns in doing.items() if who == rank), default=(0, ""))[1]
    was_in = f", most while it was in {most.removeprefix('its CPU in ')}" if most else ""
    return f"Rank {rank} was late: {ns / total:.0%} of all waiting was for it{was_in}.{_more_of(run, rank)}"


def _more_of(run: RunProfile, rank: int) -> str:
    """What the late rank's step has more of than the others'."""
    own = [dict(_named(each.parts)) for each in run.steps if each.rank == rank]
    others = [dict(_named(each.parts)) for each in run.steps if each.rank != rank]
    if not own or not others:
        return ""
    rest = {name: median_low(each[name] for each in others) for name in own[0]}
    name = max(_ITS_OWN, key=lambda each: own[0][each] - rest[each])
    mine = own[0][name]
    if mine - rest[name] < _WORTH_SAYING * run.step_ns:
        return ""
    return f" Its {name} took {ms(mine)}, the others' {ms(rest[name])}."


def _named(parts: Parts) -> tuple[tuple[str, float], ...]:
    """What people act on, with nanoseconds. Transfer has what can't be split."""
    return (
        ("compute", parts.compute_ns),
        ("waiting", parts.exposed_waiting_ns),
        ("transfer", parts.exposed_transfer_ns + parts.exposed_communication_ns),
        ("copies", parts.exposed_copy_ns),
        ("idle", parts.cpu_bound_idle_ns + parts.other_idle_ns),
    )
