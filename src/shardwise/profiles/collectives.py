"""Matches collectives over the ranks of a run, corrects the ranks' clocks by them, and says who came last and
why.

Matched by the process group's sequence numbers where the files have them; else, per group and step, by order:
the ranks' lists of (op, dtype, elements) are aligned, for capture windows differ. A set in which a rank
leaves before the last has come is refused.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.intervals import clip, total_ns, union
from shardwise.core.timeline import NONE, SpanKind, Timeline
from shardwise.core.waiting import Blame, Member, Refused, SharedCollective, Sharing
from shardwise.profiles.classify import SYMMETRIC, short_name
from shardwise.profiles.clocks import Times, correct
from shardwise.profiles.nesting import own_segments

_MOST_ALIGNED = 20_000
# to look for what a rank was doing takes a look at all its spans
_MOST_BLAMED = 500
# ranges that are in every step, or that are the collective itself
_NO_PLACE = ("ProfilerStep", "shardwise.")


@dataclass(frozen=True, slots=True)
class _Call:
    rank: int
    row: int  # in the rank's Collectives
    span: int
    op: str
    origin: str
    dtype: str
    elements: int
    full_bytes: int
    sequence: int
    step: int | None
    start_ns: int
    end_ns: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What equal calls have in common. Of an all-to-all each rank may send another amount."""
        return self.op, self.dtype, NONE if self.op == "all_to_all" else self.elements


def share(timelines: Sequence[Timeline]) -> tuple[tuple[Timeline, ...], Sharing]:
    """(the Timelines on one clock, with the arrivals filled in; what they share). timelines: one per rank, on
    one origin."""
    if len(timelines) < 2:
        count = sum(len(timeline.collectives) for timeline in timelines)
        why = "when the others arrived isn't in it, so waiting can't be told from transfer"
        refusals = (Refused(count, f"one rank's file only: {why}"),) if count else ()
        return tuple(timelines), Sharing((), (), refusals)
    refused: Counter[str] = Counter()
    matched = _matched(timelines, refused)
    clocks = correct(
        [timeline.ranks[0] for timeline in timelines],
        _times(matched, SYMMETRIC),
        _times(matched, {"barrier"}),
    )
    offsets = {clock.rank: clock.offset_ns or 0 for clock in clocks}
    placed = {timeline.ranks[0]: timeline.shifted(-offsets[timeline.ranks[0]]) for timeline in timelines}
    arrivals = {rank: np.full(len(timeline.collectives), NONE, np.int64) for rank, timeline in placed.items()}
    possible = []
    for group, calls in matched:
        shared = _shared(group, calls, offsets)
        why = _why_not_split(shared)
        if why:
            refused[why] += 1
            continue
        possible.append(shared)
        for call in calls:
            arrivals[call.rank][call.row] = shared.arrival_ns
    possible.sort(key=lambda shared: shared.arrival_ns)
    worst = sorted(range(len(possible)), key=lambda at: -possible[at].total_waiting_ns)[:_MOST_BLAMED]
    for at in worst:
        late = possible[at]
        possible[at] = replace(late, blame=_blame(late, placed[late.last_rank]))
    filled = tuple(
        replace(timeline, collectives=replace(timeline.collectives, arrival_ns=arrivals[rank]))
        for rank, timeline in placed.items()
    )
    because = tuple(Refused(count, why) for why, count in refused.most_common())
    return filled, Sharing(tuple(possible), clocks, because)


def _why_not_split(shared: SharedCollective) -> str:
    """Why its waiting can't be told from its transfer; "" where it can."""
    if shared.op not in SYMMETRIC:
        return f"{shared.op}: its ranks end at different times, so waiting can't be told from transfer"
    if not shared.is_possible:
        return "a rank leaves before the last one comes: a wrong match, or a clock that drifts"
    return ""


# --------------------------------------------------------------------------------------------- matching


def _matched(timelines: Sequence[Timeline], refused: Counter[str]) -> list[tuple[str, list[_Call]]]:
    """Sets of calls that are one collective, with the group's name."""
    everyone = tuple(timeline.ranks[0] for timeline in timelines)
    by_group: dict[tuple[str, tuple[int, ...]], dict[int, list[_Call]]] = defaultdict(dict)
    for timeline in timelines:
        for group, calls in _calls(timeline, everyone).items():
            by_group[group][timeline.ranks[0]] = calls
    matched = []
    for (name, ranks), calls_by_rank in by_group.items():
        if len(ranks) == 1:
            continue
        absent = [rank for rank in ranks if rank not in everyone]
        count = sum(len(calls) for calls in calls_by_rank.values())
        if absent:
            refused[f"the files of ranks {_listed(absent)} are missing, which are in the same group"] += count
        elif not calls_by_rank.keys() >= set(ranks):
            refused["only some of the group's ranks recorded it"] += count
        else:
            matched += [(name, calls) for calls in _sets([calls_by_rank[rank] for rank in ranks], refused)]
    return matched


def _calls(timeline: Timeline, everyone: tuple[int, ...]) -> dict[tuple[str, tuple[int, ...]], list[_Call]]:
    """A rank's collectives by group, in time's order. A group of unknown ranks is taken for everyone."""
    spans, rows, rank = timeline.spans, timeline.collectives, timeline.ranks[0]
    calls: dict[tuple[str, tuple[int, ...]], list[_Call]] = defaultdict(list)
    for row in np.argsort(spans.start_ns[rows.span], kind="stable").tolist():
        span = int(rows.span[row])
        group = timeline.groups[rows.group[row]]
        start_ns = int(spans.start_ns[span])
        steps = (window.step for window in timeline.windows if window.start_ns <= start_ns < window.end_ns)
        call = _Call(
            rank=rank,
            row=row,
            span=span,
            op=timeline.names[rows.op[row]],
            origin="" if rows.origin[row] == NONE else timeline.names[rows.origin[row]],
            dtype=timeline.names[rows.dtype[row]],
            elements=int(rows.elements[row]),
            full_bytes=int(rows.full_bytes[row]),
            sequence=int(rows.sequence[row]),
            step=next(steps, None),
            start_ns=start_ns,
            end_ns=int(spans.end_ns[span]),
        )
        calls[group.name, group.ranks or everyone].append(call)
    return calls


def _sets(lists: Sequence[list[_Call]], refused: Counter[str]) -> Iterable[list[_Call]]:
    """One list a rank -> sets with one call of every rank."""
    if all(call.sequence != NONE for calls in lists for call in calls):
        by_sequence = [{(call.sequence, call.op): call for call in calls} for calls in lists]
        common = set(by_sequence[0]).intersection(*by_sequence[1:])
        lost = sum(len(calls) for calls in lists) - len(common) * len(lists)
        if lost:
            refused["not recorded by all ranks of the group"] += lost
        return [[calls[key] for calls in by_sequence] for key in sorted(common)]
    steps = [{call.step for call in calls} for calls in lists]
    if None in set().union(*steps):
        return _aligned(lists, refused)
    sets: list[list[_Call]] = []
    for step in sorted(set().union(*steps), key=str):
        sets += _aligned([[call for call in calls if call.step == step] for calls in lists], refused)
    return sets


def _aligned(lists: Sequence[list[_Call]], refused: Counter[str]) -> list[list[_Call]]:
    keys = [[call.key for call in calls] for calls in lists]
    if all(other == keys[0] for other in keys):
        return [list(calls) for calls in zip(*lists, strict=True)]
    if max(map(len, lists)) > _MOST_ALIGNED:
        refused[f"the ranks recorded different calls, and more than {_MOST_ALIGNED:,}: give fewer steps"] += (
            sum(map(len, lists))
        )
        return []
    partners: list[dict[int, int]] = []
    for other in keys[1:]:
        blocks = SequenceMatcher(None, keys[0], other, autojunk=False).get_matching_blocks()
        partners.append({block.a + at: block.b + at for block in blocks for at in range(block.size)})
    sets = [
        [call, *(calls[partner[at]] for calls, partner in zip(lists[1:], partners, strict=True))]
        for at, call in enumerate(lists[0])
        if all(at in partner for partner in partners)
    ]
    lost = sum(map(len, lists)) - len(sets) * len(lists)
    if lost:
        refused["not recorded by all ranks of the group"] += lost
    return sets


def _times(matched: Sequence[tuple[str, list[_Call]]], ops: Container[str]) -> list[Times]:
    return [
        {call.rank: (call.start_ns, call.end_ns) for call in calls}
        for _, calls in matched
        if calls[0].op in ops
    ]


def _shared(group: str, calls: Sequence[_Call], offsets: Mapping[int, int]) -> SharedCollective:
    first = calls[0]
    members = tuple(
        Member(call.rank, call.span, call.start_ns - offsets[call.rank], call.end_ns - offsets[call.rank])
        for call in calls
    )
    sizes = [call.full_bytes for call in calls]
    full = None if NONE in sizes else max(sizes)
    is_sized = full is not None and first.op in SYMMETRIC
    wire = wire_bytes(CollectiveKind(first.op), full or 0, len(calls)) if is_sized else None
    ranks = tuple(call.rank for call in calls)
    return SharedCollective(first.op, first.origin, group, ranks, first.step, members, full, wire)


# --------------------------------------------------------------------------------------------- who was late,
# and why


def _blame(shared: SharedCollective, timeline: Timeline) -> Blame | None:
    """What the last rank did while the first one waited for it."""
    begin_ns, end_ns = min(member.start_ns for member in shared.members), shared.arrival_ns
    if end_ns <= begin_ns:
        return None
    own = next(member.span for member in shared.members if member.rank == shared.last_rank)
    spans = timeline.spans
    near = (spans.start_ns < end_ns) & (spans.end_ns > begin_ns)
    near[own] = False
    works = np.flatnonzero(near & (spans.kind <= SpanKind.COPY))
    device_ns = total_ns(clip(union(spans.start_ns[works], spans.end_ns[works]), begin_ns, end_ns))
    if 2 * device_ns < end_ns - begin_ns:
        return _blame_cpu(timeline, own, near, begin_ns, end_ns)
    busy = Counter[str]()
    for span in works.tolist():
        start_ns, stop_ns = int(spans.start_ns[span]), int(spans.end_ns[span])
        busy[timeline.name(span)] += _within(start_ns, stop_ns, begin_ns, end_ns)
    doing, ns = busy.most_common(1)[0]
    return Blame(short_name(doing), ns, end_ns - begin_ns)


def _blame_cpu(timeline: Timeline, own: int, near: NDArray[np.bool_], begin_ns: int, end_ns: int) -> Blame:
    """The rank had nothing to do on its device: what the thread that called for the collective was in."""
    spans = timeline.spans
    caller = int(spans.parent[own])
    lane = int(spans.lane[caller]) if caller != NONE else _busiest_thread(timeline)
    on_thread = np.flatnonzero(near & (spans.lane == lane) & (spans.kind >= SpanKind.OP))
    in_ops, in_ranges = Counter[str](), Counter[str]()
    for span, start_ns, stop_ns in own_segments(spans, on_thread):
        inside = in_ranges if spans.kind[span] == SpanKind.RANGE else in_ops
        inside[timeline.name(span)] += max(0, _within(start_ns, stop_ns, begin_ns, end_ns))
    waited_ns = end_ns - begin_ns
    nothing_ns = waited_ns - sum(in_ops.values())
    doing, ns = in_ops.most_common(1)[0] if in_ops else ("", 0)
    if ns >= nothing_ns:
        return Blame(f"its CPU in {short_name(doing)}", ns, waited_ns, is_cpu=True)
    places = [name for name, _ in in_ranges.most_common() if not name.startswith(_NO_PLACE)]
    where = f" inside {places[0]}" if places else ""
    said = f"its CPU in no recorded op{where}: Python, a sleep, or not scheduled"
    return Blame(said, nothing_ns, waited_ns, is_cpu=True)


def _busiest_thread(timeline: Timeline) -> int:
    """The CPU thread with the most ops, where a collective's caller isn't known."""
    lanes = timeline.spans.lane[timeline.spans.kind == SpanKind.OP]
    return int(np.bincount(lanes).argmax()) if len(lanes) else NONE


def _within(start_ns: int, stop_ns: int, begin_ns: int, end_ns: int) -> int:
    return min(stop_ns, end_ns) - max(start_ns, begin_ns)


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
