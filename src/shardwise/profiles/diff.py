"""Two RunProfiles -> Difference: the same work found in both, and a verdict that claims no more than the traces show."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from shardwise.core.difference import CollectiveUse, Difference, Line, Matched, RunProfile, Use, Work

_WORTH_SAYING = 0.02  # of a step
_NAMES_SHOWN = 6


def diff(first: RunProfile, second: RunProfile) -> Difference:
    """second against first."""
    cpu_first, cpu_second = dict(first.cpu.by_op), dict(second.cpu.by_op)
    cpu_lines = [
        (name, cpu_first.get(name, Use()), cpu_second.get(name, Use()))
        for name in cpu_first.keys() | cpu_second.keys()
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
        op = one.name.replace("_", "-") if len(names) == 1 else "collectives"
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
    change = second.step_ns - step
    if step <= 0:
        return
    ratio = second.step_ns / step
    relation = (
        "takes as long" if abs(change) < _WORTH_SAYING * step else "is slower" if change > 0 else "is faster"
    )
    yield (
        f"{second.label} {relation}: {ms(second.step_ns)} a step against {ms(step)} of {first.label}, {ratio:.2f} times."
        + _spread(first, second)
    )
    delta = second.parts - first.parts
    named = (
        ("compute", delta.compute_ns),
        ("exposed transfer", delta.exposed_transfer_ns),
        ("exposed communication, not split", delta.exposed_communication_ns),
        ("exposed waiting", delta.exposed_waiting_ns),
        ("exposed copies", delta.exposed_copy_ns),
        ("idle because the CPU had not launched the next work", delta.cpu_bound_idle_ns),
        ("other idle", delta.other_idle_ns),
    )
    large = sorted(
        (part for part in named if abs(part[1]) >= _WORTH_SAYING * step), key=lambda part: -abs(part[1])
    )
    if large:
        yield (
            "The change is "
            + ", ".join(f"{signed_ms(ns)} {name}" for name, ns in large)
            + "; the rest is smaller than 2 % of a step."
        )
    else:
        yield "No part of the step changes by 2 % of it."
    by_class = _class_changes(first, second)
    worth = [(name, ns) for name, ns in by_class if abs(ns) >= _WORTH_SAYING / 2 * step][:5]
    if worth:
        yield (
            "By kind of work, hidden or not: "
            + ", ".join(f"{name} {signed_ms(ns)}" for name, ns in worth)
            + "."
        )
    for run in (first, second):
        yield from collective_words(run)


def _class_changes(first: RunProfile, second: RunProfile) -> list[tuple[str, float]]:
    """(kind of work, nanoseconds a step), the largest change first."""
    change: dict[str, float] = defaultdict(float)
    for run, sign in ((first, -1), (second, 1)):
        for work, use in run.work:
            change[
                f"{work.name.replace('_', '-')}s" if work.of_class == "communication" else work.of_class
            ] += sign * use.ns
    return sorted(change.items(), key=lambda pair: (-abs(pair[1]), pair[0]))


def run_words(run: RunProfile) -> tuple[str, ...]:
    """One run by itself, in words."""
    if run.step_ns <= 0:
        return ()
    hidden = (
        f", {100 * run.overlap_share:.1f} % of them hidden behind compute"
        if run.overlap_share is not None
        else ""
    )
    return (
        f"A step takes {ms(run.step_ns)}: {100 * run.parts.compute_ns / run.step_ns:.1f} % compute, "
        f"{100 * run.parts.exposed_ns / run.step_ns:.1f} % exposed communication. Collectives take {ms(run.communication_ns)}{hidden}.",
        *collective_words(run, prefix=""),
    )


def _spread(first: RunProfile, second: RunProfile) -> str:
    ranges = []
    for run in (first, second):
        lengths = [step.length_ns for step in run.steps]
        ranges.append((min(lengths), max(lengths)))
    if min(len(first.steps), len(second.steps)) < 2:
        return " One window on a side: how much steps differ by themselves isn't known."
    (low_1, high_1), (low_2, high_2) = ranges
    if low_1 <= high_2 and low_2 <= high_1:
        return f" Their steps overlap ({ms(low_1)} to {ms(high_1)}, {ms(low_2)} to {ms(high_2)}): take it with care."
    return f" Their steps don't overlap ({ms(low_1)} to {ms(high_1)}, {ms(low_2)} to {ms(high_2)})."


def collective_words(run: RunProfile, *, prefix: str | None = None) -> Iterable[str]:
    """Sentences for the collectives that take more than 2 % of a step; prefix: by default the run's label."""
    start = f"{run.label}: " if prefix is None else prefix
    large = [each for each in run.collectives if each.use.ns >= _WORTH_SAYING * run.step_ns]
    for each in large:
        if each.waiting_ns is not None and each.transfer_ns is not None:
            yield f"{start}{_split(each, each.waiting_ns, each.transfer_ns)}"
    whole = [each for each in large if each.waiting_ns is None]
    if whole:
        why = (
            run.sharing.refused[0].why
            if run.sharing.refused
            else "its calls could not be matched over the ranks"
        )
        yield f"{start}{', '.join(map(_named, whole))} a step. Waiting and transfer can't be told apart: {why}."


def _named(each: CollectiveUse) -> str:
    asked = f" of {each.origin}" if each.origin else ""
    return f"{each.op.replace('_', '-')}{asked} {ms(each.use.ns)} ({each.use.count:.3g} call{'' if each.use.count == 1 else 's'})"


def _split(each: CollectiveUse, waiting_ns: float, transfer_ns: float) -> str:
    late = ""
    if each.late is not None:
        rank, share, doing = each.late
        late = f", {'all' if share > 0.995 else f'{100 * share:.0f} %'} of it for rank {rank}"
        late += (
            f", which was in {doing}"
            if doing and not doing.startswith("its CPU")
            else f", {doing}"
            if doing
            else ""
        )
    speed = ""
    if each.bus_bytes_per_s is not None:
        speed = f", at {'most ' if each.is_bound else ''}{each.bus_bytes_per_s / 1e9:.3g} GB/s (bus)"
    bound = "at least " if each.is_bound else ""
    return f"{_named(each)} a step: {ms(waiting_ns)} before the last rank came{late}; {bound}{ms(transfer_ns)} transfer{speed}."


def ms(ns: float) -> str:
    """Milliseconds for people."""
    value = ns / 1e6
    if 0 < abs(value) < 0.1:
        return f"{ns / 1e3:.3g} µs"
    return f"{value:,.0f} ms" if abs(value) >= 1000 else f"{value:.3g} ms"


def signed_ms(ns: float) -> str:
    return f"{'+' if ns >= 0 else '-'}{ms(abs(ns))}"
