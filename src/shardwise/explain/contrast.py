"""contrast(): two Explanations of the same model, mesh and step -> what each plan does that the other
doesn't, and what it comes to."""

from collections.abc import Iterator

from shardwise.core.collective import collective_name
from shardwise.core.errors import OptionError
from shardwise.core.explanation import CollectiveGroup, Contrast, Explanation
from shardwise.core.program import MemoryKind, Phase
from shardwise.explain.words import relation, size


def contrast(first: Explanation, second: Explanation) -> Contrast:
    """Raises OptionError where they aren't about the same thing."""
    for what in ("model", "axes", "settings", "device", "rank"):
        if getattr(first, what) != getattr(second, what):
            raise OptionError(
                f"two plans are compared on the same {what}: {getattr(first, what)} is not "
                f"{getattr(second, what)}."
            )
    ours, theirs = _by_place(first), _by_place(second)
    only_first = tuple(group for key, groups in ours.items() if key not in theirs for group in groups)
    only_second = tuple(group for key, groups in theirs.items() if key not in ours for group in groups)
    different = tuple(
        (a, b)
        for key, groups in ours.items()
        if key in theirs
        for a, b in zip(groups, theirs[key], strict=False)
        if _sizes(a) != _sizes(b)
    )
    lines = tuple(_lines(first, second, (only_first, only_second)))
    return Contrast(first, second, only_first, only_second, different, lines)


_Key = tuple[str, str, str, Phase]


def _by_place(explanation: Explanation) -> dict[_Key, list[CollectiveGroup]]:
    found: dict[_Key, list[CollectiveGroup]] = {}
    for group in explanation.collectives:
        found.setdefault((str(group.kind), group.axis, group.module, group.phase), []).append(group)
    return found


def _sizes(group: CollectiveGroup) -> tuple[int, int, float]:
    return group.count, group.payload_bytes, group.wire_bytes


def _measures(explanation: Explanation) -> Iterator[tuple[str, str, float, str]]:
    """(of one plan, of both, how much, of what) of what is said of a plan, bytes but for the collectives."""
    held = dict(explanation.held)
    yield "sends", "send", explanation.wire_bytes, "over the wire in a step"
    yield "holds", "hold", held[MemoryKind.PARAMETER], "of parameters"
    yield "holds", "hold", held[MemoryKind.GRADIENT], "of gradients"
    yield "holds", "hold", held[MemoryKind.OPTIMIZER], "of optimizer state"
    yield "needs", "need", explanation.peak.n_bytes, "at the peak"
    yield "issues", "issue", sum(group.count for group in explanation.collectives), "collectives"
    yield "copies", "copy", sum(group.total_bytes for group in explanation.copies), "in a step"


def _lines(
    first: Explanation, second: Explanation, only: tuple[tuple[CollectiveGroup, ...], ...]
) -> Iterator[str]:
    """only: the collectives that each has and the other hasn't."""
    for (verb, of_both, a, what), (_, _, b, _) in zip(_measures(first), _measures(second), strict=True):
        shown = size if what != "collectives" else "{:,.0f}".format
        if a == b:
            yield f"Both {of_both} {shown(a)} {what}."
            continue
        ratio = f", {relation(a, b)}" if a and b else ""
        yield f"{first.plan} {verb} {shown(a)} {what}; {second.plan} {shown(b)}{ratio}."
    for explanation, groups in zip((first, second), only, strict=True):
        places = (f"{collective_name(g.carries_out)} in {g.module or 'the step'} ({g.phase})" for g in groups)
        told = list(dict.fromkeys(places))
        if told:
            yield f"Only {explanation.plan} has: {'; '.join(told[:6])}{'; ...' if len(told) > 6 else ''}."
