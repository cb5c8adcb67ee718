"""Two RunProfiles -> Difference: the same work found in both, and a verdict in words."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from shardwise.core.collective import collective_name
from shardwise.core.difference import CollectiveUse, Difference, Line, Matched, RunProfile, Use, Work

_WORTH_SAYING = 0.02  # of a step
_NAMES_SHOWN = 6
_PART_NAMES = {
    "compute_ns": "compute",
    "exposed_transfer_ns": "exposed transfer",
    "exposed_communication_ns": "exposed communication, not split",
    "exposed_waiting_ns": "exposed waiting",
    "exposed_copy_ns": "exposed copies",
    "cpu_bound_idle_ns": "idle because the CPU had not launched the next work",
    "other_idle_ns": "other idle",
}


def diff(first: RunProfile, second: RunProfile) -> Difference:
    """second against first."""
    cpu = [dict(run.cpu.by_op) for run in (first, second)]
    cpu_lines = [
        (name, cpu[0].get(name, Use()), cpu[1].get(name, Use())) for name in cpu[0].keys() | cpu[1].keys()
    ]
    cpu_lines.sort(key=lambda line: (-abs(line[2].ns - line[1].ns), line[0]))
    lines = sorted(
        _lines(dict(first.work), dict(second.work)),
        key=lambda line: (-abs(line.delta_ns), line.what, line.shapes),
    )
    return Difference(first, second, tuple(lines), tuple(cpu_lines), tuple(_verdict(first, second)))


# --------------------------------------------------------------------------------------------- matching


def _lines(first: dict[Work, Use], second: dict[Work, Use]) -> Iterable[Line]:
    levels: tuple[tuple[Matched, Callable[[Work], Hashable]], ...] = (
        (Matched.KERNEL, lambda work: (work.kind, work.op, work.shapes, work.name)),
        (Matched.OP, lambda work: (work.kind, work.op, work.shapes) if work.op else work),
        (Matched.NAME, lambda work: (work.kind, work.name)),
        (Matched.CLASS, lambda work: (work.kind, work.of_class)),
    )
    for matched, key in levels:
        left, right = _grouped(first, key), _grouped(second, key)
        for common in left.keys() & right.keys():
            yield _line(matched, left[common], right[common])
            for works, side in ((left[common], first), (right[common], second)):
                for work in works:
                    del side[work]
    for work, use in first.items():
        yield _line(Matched.FIRST, {work: use}, {})
    for work, use in second.items():
        yield _line(Matched.SECOND, {}, {work: use})


def _grouped(uses: dict[Work, Use], key: Callable[[Work], Hashable]) -> dict[Hashable, dict[Work, Use]]:
    groups: dict[Hashable, dict[Work, Use]] = defaultdict(dict)
    for work, use in uses.items():
        groups[key(work)][work] = use
    return groups


def _line(matched: Matched, first: dict[Work, Use], second: dict[Work, Use]) -> Line:
    works = [*first, *second]
    one = works[0]
    by_class = matched is Matched.CLASS
    ops = {work.op for work in works if work.op}
    shapes = {work.shapes for work in works}
    names = {work.name for work in works}
    if by_class:
        what = "other collectives" if one.of_class == "communication" else one.of_class
    elif one.of_class == "communication":
        op = collective_name(one.name) if len(names) == 1 else "collectives"
        what = f"{op} of {one.op}" if len(ops) == 1 else op
    elif len(names) > 1:
        what = one.op
    else:
        what = f"{one.name} in {one.op}" if len(ops) == 1 and one.name not in ops else one.name
    return Line(
        matched=_of_collective(matched, one),
        kind=one.kind.lower(),
        what=what,
        shapes=next(iter(shapes)) if len(shapes) == 1 and not by_class else "",
        first=sum(first.values(), Use()),
        second=sum(second.values(), Use()),
        first_names=_names(first),
        second_names=_names(second),
        is_copy=all(work.is_copy for work in works),
    )


def _of_collective(matched: Matched, work: Work) -> Matched:
    """A collective's op is the module that asked for it."""
    if work.of_class != "communication" or matched not in (Matched.KERNEL, Matched.OP):
        return matched
    return Matched.MODULE if work.op else Matched.NAME


def _names(uses: dict[Work, Use]) -> tuple[str, ...]:
    total: dict[str, float] = defaultdict(float)
    for work, use in uses.items():
        total[work.name] += use.ns
    return tuple(sorted(total, key=lambda name: (-total[name], name))[:_NAMES_SHOWN])


# --------------------------------------------------------------------------------------------- in words


def _verdict(first: RunProfile, second: RunProfile) -> Iterable[str]:
    step = first.step_ns
    if step <= 0:
        return
    change = second.step_ns - step
    relation = "is slower" if change > 0 else "is faster"
    if abs(change) < _WORTH_SAYING * step:
        relation = "takes as long"
    yield (
        f"{second.label} {relation}: {ms(second.step_ns)} a step against {ms(step)} of {first.label}, "
        f"{second.step_ns / step:.2f} times.{_spread(first, second)}"
    )
    delta = second.parts - first.parts
    parts = [(name, getattr(delta, field)) for field, name in _PART_NAMES.items()]
    large = sorted(
        (each for each in parts if abs(each[1]) >= _WORTH_SAYING * step), key=lambda each: -abs(each[1])
    )
    if large:
        changes = ", ".join(f"{signed_ms(ns)} {name}" for name, ns in large)
        yield f"The change is {changes}; the rest is smaller than 2 % of a step."
    else:
        yield "No part of the step changes by 2 % of it."
    by_class = _class_changes(first, second)
    worth = [f"{name} {signed_ms(ns)}" for name, ns in by_class if abs(ns) >= _WORTH_SAYING / 2 * step]
    if worth:
        yield f"By kind of work, hidden or not: {', '.join(worth[:5])}."
    for run in (first, second):
        yield from collective_words(run)


def _class_changes(first: RunProfile, second: RunProfile) -> list[tuple[str, float]]:
    """(kind of work, nanoseconds a step), the largest change first."""
    change: dict[str, float] = defaultdict(float)
    for run, sign in ((first, -1), (second, 1)):
        for work, use in run.work:
            is_collective = work.of_class == "communication"
            name = f"{work.name.replace('_', '-')}s" if is_collective else work.of_class
            change[name] += sign * use.ns
    return sorted(change.items(), key=lambda pair: (-abs(pair[1]), pair[0]))


def run_words(run: RunProfile) -> tuple[str, ...]:
    """One run by itself, in words."""
    if run.step_ns <= 0:
        return ()
    parts, share = run.parts, run.overlap_share
    hidden = "" if share is None else f", {100 * share:.1f} % of them hidden behind compute"
    return (
        f"A step takes {ms(run.step_ns)}: {100 * parts.compute_ns / run.step_ns:.1f} % compute, "
        f"{100 * parts.exposed_ns / run.step_ns:.1f} % exposed communication. "
        f"Collectives take {ms(run.communication_ns)}{hidden}.",
        *collective_words(run, prefix=""),
    )


def _spread(first: RunProfile, second: RunProfile) -> str:
    if min(len(first.steps), len(second.steps)) < 2:
        return " One window on a side: how much steps differ by themselves isn't known."
    lengths = [[step.length_ns for step in run.steps] for run in (first, second)]
    (low_1, high_1), (low_2, high_2) = [(min(each), max(each)) for each in lengths]
    ranges = f"({ms(low_1)} to {ms(high_1)}, {ms(low_2)} to {ms(high_2)})"
    if low_1 <= high_2 and low_2 <= high_1:
        return f" Their steps overlap {ranges}: take it with care."
    return f" Their steps don't overlap {ranges}."


def collective_words(run: RunProfile, *, prefix: str | None = None) -> Iterable[str]:
    """Sentences for the collectives that take more than 2 % of a step; prefix: by default the run's label."""
    start = f"{run.label}: " if prefix is None else prefix
    large = [each for each in run.collectives if each.use.ns >= _WORTH_SAYING * run.step_ns]
    for each in large:
        if each.waiting_ns is not None and each.transfer_ns is not None:
            yield f"{start}{_split(each, each.waiting_ns, each.transfer_ns)}"
    whole = [_named(each) for each in large if each.waiting_ns is None]
    if whole:
        refused = run.sharing.refused
        why = refused[0].why if refused else "its calls could not be matched over the ranks"
        yield f"{start}{', '.join(whole)} a step. Waiting and transfer can't be told apart: {why}."


def _named(each: CollectiveUse) -> str:
    asked = f" of {each.origin}" if each.origin else ""
    calls = f"{each.use.count:.3g} call{'' if each.use.count == 1 else 's'}"
    return f"{each.op.replace('_', '-')}{asked} {ms(each.use.ns)} ({calls})"


def _split(each: CollectiveUse, waiting_ns: float, transfer_ns: float) -> str:
    late = ""
    if each.late is not None:
        rank, share, doing = each.late
        late = f", {'all' if share > 0.995 else f'{100 * share:.0f} %'} of it for rank {rank}"
        if doing:
            late += f", {doing}" if doing.startswith("its CPU") else f", which was in {doing}"
    bound, most = ("at least ", "most ") if each.is_bound else ("", "")
    speed = "" if each.bus_bytes_per_s is None else f", at {most}{each.bus_bytes_per_s / 1e9:.3g} GB/s (bus)"
    return (
        f"{_named(each)} a step: {ms(waiting_ns)} before the last rank came{late}; "
        f"{bound}{ms(transfer_ns)} transfer{speed}."
    )


def ms(ns: float) -> str:
    """Milliseconds for people."""
    value = ns / 1e6
    if 0 < abs(value) < 0.1:
        return f"{ns / 1e3:.3g} µs"
    return f"{value:,.0f} ms" if abs(value) >= 1000 else f"{value:.3g} ms"


def signed_ms(ns: float) -> str:
    return f"{'+' if ns >= 0 else '-'}{ms(abs(ns))}"
