"""contrast(): two Explanations of the same model, mesh and step -> what each plan does that the other doesn't, and what it comes to."""

from collections.abc import Callable

from shardwise.core.errors import OptionError
from shardwise.core.explanation import CollectiveGroup, Contrast, Explanation
from shardwise.core.program import MemoryKind, Phase
from shardwise.explain.words import named, relation, size


def contrast(first: Explanation, second: Explanation) -> Contrast:
    """Raises OptionError where they aren't about the same thing."""
    for what in ("model", "axes", "settings", "device", "rank"):
        if getattr(first, what) != getattr(second, what):
            raise OptionError(
                f"two plans are compared on the same {what}: {getattr(first, what)} is not {getattr(second, what)}."
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
    return Contrast(
        first,
        second,
        only_first,
        only_second,
        different,
        tuple(_lines(first, second, only_first, only_second)),
    )


_Key = tuple[str, str, str, Phase]


def _by_place(explanation: Explanation) -> dict[_Key, list[CollectiveGroup]]:
    found: dict[_Key, list[CollectiveGroup]] = {}
    for group in explanation.collectives:
        found.setdefault((str(group.kind), group.axis, group.module, group.phase), []).append(group)
    return found


def _sizes(group: CollectiveGroup) -> tuple[int, int, float]:
    return group.count, group.payload_bytes, group.wire_bytes


def _lines(
    first: Explanation,
    second: Explanation,
    only_first: tuple[CollectiveGroup, ...],
    only_second: tuple[CollectiveGroup, ...],
) -> list[str]:
    lines = [_compared("sends", first, second, lambda e: e.wire_bytes, "over the wire in a step")]
    for kind, what in (
        (MemoryKind.PARAMETER, "parameters"),
        (MemoryKind.GRADIENT, "gradients"),
        (MemoryKind.OPTIMIZER, "optimizer state"),
    ):
        lines.append(_compared("holds", first, second, lambda e, kind=kind: dict(e.held)[kind], f"of {what}"))  # type: ignore[misc]
    lines.append(_compared("needs", first, second, lambda e: e.peak.n_bytes, "at the peak"))
    lines.append(
        _compared(
            "issues",
            first,
            second,
            lambda e: sum(g.count for g in e.collectives),
            "collectives",
            as_bytes=False,
        )
    )
    lines.append(
        _compared("copies", first, second, lambda e: sum(g.total_bytes for g in e.copies), "in a step")
    )
    for explanation, only in ((first, only_first), (second, only_second)):
        places = dict.fromkeys(
            f"{named(group.carries_out)} in {group.module or 'the step'} ({group.phase})" for group in only
        )
        if places:
            shown = list(places)
            lines.append(
                f"Only {explanation.plan} has: {'; '.join(shown[:6])}{'; ...' if len(shown) > 6 else ''}."
            )
    return lines


def _compared(
    verb: str,
    first: Explanation,
    second: Explanation,
    of: Callable[[Explanation], float],
    what: str,
    *,
    as_bytes: bool = True,
) -> str:
    a, b = of(first), of(second)
    shown = size if as_bytes else (lambda value: f"{value:,.0f}")
    if a == b:
        return f"Both {verb.removesuffix('s') if verb != 'copies' else 'copy'} {shown(a)} {what}."
    ratio = f", {relation(a, b)}" if a and b else ""
    return f"{first.plan} {verb} {shown(a)} {what}; {second.plan} {shown(b)}{ratio}."
