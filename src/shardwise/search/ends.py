"""Styles of what lies outside the layers (a look-up, the head), and what they change: the same whatever
styles the layers have, and however many of these are recomputed. So they aren't searched with each of them,
but added to those answers that are near enough."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from shardwise.core.layer_name import repeats
from shardwise.core.search import SEQUENCE, can_be

LIGHTER = 0.001
"""What needs less memory than the default by this share of a device's is searched with the layers: fewer of
these may have to be recomputed."""

Pair = tuple[str, str]
Styles = tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """Of one group or several. seconds, n_bytes: that a step takes, and a device holds, more."""

    pairs: Styles
    seconds: float
    n_bytes: float

    def of(self, styles: Styles) -> Styles:
        own = dict(self.pairs)
        return tuple((name, own.get(name, option)) for name, option in styles)


def is_end(pair: Pair) -> bool:
    """Whether a group's style is of what lies outside the layers."""
    return pair[0] != SEQUENCE and not repeats(pair[0])


def changes_of_ends(base: Styles, changes: Mapping[Pair, tuple[float, float]]) -> Iterator[Change]:
    """All that change one end or several. changes: (seconds, bytes) of single ones."""
    options: list[Sequence[Pair]] = [
        [own, *(pair for pair in changes if pair[0] == own[0] and is_end(own))] for own in base
    ]
    for chosen in product(*options):
        pairs = tuple(pair for pair in chosen if pair not in base)
        if pairs and can_be(dict(chosen)):
            seconds, n_bytes = (sum(changes[pair][at] for pair in pairs) for at in (0, 1))
            yield Change(pairs, seconds, n_bytes)


def own_ends(styles: Styles, base: Styles) -> Styles:
    """The base with the ends of `styles`."""
    return tuple(pair if is_end(pair) else own for pair, own in zip(styles, base, strict=True))
