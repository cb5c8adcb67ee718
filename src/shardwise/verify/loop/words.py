"""Findings of a loop as lines: for an AssertionError."""

from collections.abc import Sequence

from shardwise.core.finding import Finding

_MOST_LINES = 12


def lines_of(found: Sequence[Finding]) -> list[str]:
    """A finding each; those that only follow in a line of their own."""
    own = [each for each in found if each.follows is None] or list(found)
    lines = []
    for each in own[:_MOST_LINES]:
        error = each.relative_error
        off = "" if error is None or error == float("inf") else f" ({100 * error:.3g} % off)"
        advice = f" {each.advice}" if each.advice else ""
        lines.append(f"- {each.subject}: {each.reason}{off}.{advice}")
    if len(own) > _MOST_LINES:
        lines.append(f"- and {len(own) - _MOST_LINES} more")
    rest = list(dict.fromkeys(each.subject for each in found if each not in own))
    if rest:
        more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
        lines.append(f"What follows: {', '.join(rest[:4])}{more}.")
    return lines
