"""What is put together of pieces: how few layers must be recomputed, which styles differ in what, and which
answers are alike."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from shardwise.core.search import SEQUENCE, Group, can_be
from shardwise.predict.allocator import LARGE_SEGMENT
from shardwise.search.problem import Answer

ALIKE = 0.01
"""Plans that differ in styles, recompute or resharding alone, by less than this share of the step, are
alike: only the best of them is given out."""
Styles = tuple[tuple[str, str], ...]


def fewest_layers(over_bytes: float, freed_bytes: float, layers: int) -> int:
    """So many of `layers` must be recomputed at least, where a device holds over_bytes too much, and each
    frees freed_bytes at most (0: nobody knows); and all together a segment of the allocator's more, which is
    then never asked for."""
    if freed_bytes <= 0:
        return 1
    return min(layers, max(1, math.ceil((over_bytes - LARGE_SEGMENT) / freed_bytes - 1e-9)))


def singles(base: Styles, groups: Sequence[Group]) -> list[Styles]:
    """With another style of one group each."""
    found = []
    for group in groups:
        for option in group.options:
            styles = tuple((name, option if name == group.name else own) for name, own in base)
            if group.name != SEQUENCE and styles != base and can_be(dict(styles)):
                found.append(styles)
    return found


def styles_of_all(base: Styles, changes: Sequence[tuple[str, str]]) -> Iterator[Styles]:
    """All that make two of the changes (group, option) or more, each group's at most once."""
    options = [[own, *(pair for pair in changes if pair[0] == own[0])] for own in base]
    for chosen in product(*options):
        if sum(pair not in base for pair in chosen) > 1 and can_be(dict(chosen)):
            yield chosen


def are_alike(one: Answer, other: Answer) -> bool:
    a, b = (
        replace(each.candidate, styles=(), recompute="none", recomputed=0, reshard=True)
        for each in (one, other)
    )
    return a == b and abs(one.prediction.step_s / other.prediction.step_s - 1) < ALIKE
