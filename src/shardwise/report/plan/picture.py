"""Dims -> a picture: the weights as rectangles in the order of the forward, each rank's part of what is cut
in the colour of its class. Computes places and sizes in pixels, and knows no page.

What a class makes and what takes it back stand side by side in one group, with the weights that are used in
between. A weight's left and upper edges have the colours of the classes of its rows and columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwise.core.dims import Dims, Weight
from shardwise.core.shown import shown
from shardwise.report.plan import rows

COLOURS = 6
_NEUTRAL = 6
"""Of the hidden width and all that isn't cut."""
_LEAST, _MOST = 16.0, 84.0
_FLAT = 9.0
_STRIP = 3.0
_GAP, _LINE, _CHARACTER = 14.0, 13.0, 6.3
_ARROW = 20.0
_LONGEST = 26
BANDS = 8
"""Ranks that are drawn; more would be hairs."""


@dataclass(frozen=True, slots=True)
class Area:
    """A rectangle; colour: of the page's palette; is_own: the first rank's part."""

    x: float
    y: float
    width: float
    height: float
    colour: int = _NEUTRAL
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """A weight. behind: of how many equal matrices it is the first (experts)."""

    label: str
    shape: str
    about: str
    area: Area
    is_cut: bool
    bands: tuple[Area, ...]
    strips: tuple[Area, ...]
    behind: int


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that stand together; of a class that is cut, or of none. arrows: (from x, to x), at
    arrow_y. sum_x: where its sum stands."""

    title: str
    colour: int | None
    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[tuple[float, float], ...]
    arrow_y: float
    sum_x: float | None


@dataclass(frozen=True, slots=True)
class Part:
    """What comes before the layers, in each of them, or after."""

    title: str
    groups: tuple[Group, ...]


def picture(dims: Dims) -> tuple[Part, ...]:
    """The parts of a model that have weights."""
    prefix = f"{dims.layers[0]}." if dims.layers is not None else None
    inside = [prefix is not None and each.name.startswith(prefix) for each in dims.weights]
    if not any(inside):
        return (Part("The model", tuple(_groups(dims, dims.weights, ""))),)
    first = inside.index(True)
    assert dims.layers is not None
    assert prefix is not None
    before = [each for at, each in enumerate(dims.weights) if not inside[at] and at < first]
    layer = [each for at, each in enumerate(dims.weights) if inside[at]]
    after = [each for at, each in enumerate(dims.weights) if not inside[at] and at > first]
    parts = (
        ("Before the layers", before, ""),
        (f"A layer, of {dims.layers[1]}", layer, prefix),
        ("After the layers", after, ""),
    )
    return tuple(Part(title, tuple(_groups(dims, own, start))) for title, own, start in parts if own)


def colours(dims: Dims) -> dict[int, int]:
    """Place of a class that is cut -> its colour."""
    cut = [at for at, each in enumerate(dims.classes) if each.is_cut]
    return {at: number % COLOURS for number, at in enumerate(cut)}


def _groups(dims: Dims, weights: Sequence[Weight], prefix: str) -> Iterator[Group]:
    """prefix: of the layer, where they are a layer's."""
    scale = max((size for each in weights for size in each.shape), default=1)
    owners: dict[int | str, list[Weight]] = {}
    for each in weights:
        owners.setdefault(_owner(dims, each, prefix), []).append(each)
    for owner, own in owners.items():
        if isinstance(owner, int):
            yield _class_group(dims, owner, own, prefix, scale)
        else:
            yield _drawn(dims, "", None, [own], prefix, scale=scale, has_sum=False)


def _owner(dims: Dims, weight: Weight, prefix: str) -> int | str:
    """The class in whose group a weight stands: that by which it is cut, or that of the module that it is
    in."""
    around: list[int] = []
    for at, each in enumerate(dims.classes):
        if not each.is_cut or each.name == rows.VOCABULARY:
            continue
        if any(member.parameter == weight.name and member.held for member in each.members):
            return at
        is_below = each.where and f"{each.where}." != prefix and weight.name.startswith(f"{each.where}.")
        if is_below and each.times == weight.times:
            around.append(at)
    return around[0] if around else weight.name


def _class_group(dims: Dims, at: int, own: list[Weight], prefix: str, scale: int) -> Group:
    made = dims.classes[at]
    first, last = rows.makers(made), rows.takers(made)
    columns: list[list[Weight]] = [[], [], [], []]
    for each in own:
        module = each.name.rpartition(".")[0]
        if module in first:
            columns[1].append(each)
        elif module in last:
            columns[3].append(each)
        else:
            columns[2 if columns[1] else 0].append(each)
    used = [column for column in columns if column]
    title = f"{rows.counted(made)}{f', {made.width} wide' if made.width > 1 else ''}"
    return _drawn(dims, title, colours(dims)[at], used, prefix, scale=scale, has_sum=bool(made.ends))


def _drawn(
    dims: Dims,
    title: str,
    colour: int | None,
    columns: list[list[Weight]],
    prefix: str,
    *,
    scale: int,
    has_sum: bool,
) -> Group:
    """scale: the size of the longest side of all."""
    boxes: list[Box] = []
    firsts: list[Box] = []
    x, height = 0.0, 0.0
    for column in columns:
        y, width = 0.0, 0.0
        for weight in column:
            box = _box(dims, weight, (x, y), prefix, scale)
            boxes.append(box)
            firsts += [box] if not y else []
            words = max(len(box.label), len(box.shape)) * _CHARACTER
            width = max(width, box.area.width, words)
            y = box.area.y + box.area.height + 2 * _LINE + _GAP
        x, height = x + width + _ARROW, max(height, y)
    sum_x = x + 4 if has_sum else None
    ends = [box.area.x + box.area.width + 4 for box in firsts]
    starts = [box.area.x - 8 for box in firsts[1:]] + ([x - 8] if has_sum else [])
    return Group(
        title, colour, x + (20 if has_sum else 4 - _ARROW), height, tuple(boxes),
        tuple(zip(ends, starts, strict=False)), min(each.area.y + each.area.height / 2 for each in firsts),
        sum_x,
    )  # fmt: skip


def _box(dims: Dims, weight: Weight, at: tuple[float, float], prefix: str, largest: int) -> Box:
    x, y = at
    found = rows.cut_of(weight.held)
    cut = found[0] % len(weight.shape) if found is not None else None
    down, across = _sides(weight, cut)
    height = _length(math.prod(weight.shape[side] for side in down), largest) if down else _FLAT
    width = _length(math.prod(weight.shape[side] for side in across), largest) if across else _FLAT
    area = Area(x + _STRIP + 1, y + _STRIP + 1, width, height)
    bands: tuple[Area, ...] = ()
    if cut is not None and found is not None:
        _, pieces, parts = found
        colour = next((each for each in map(colours(dims).get, weight.classes[cut]) if each is not None), 0)
        sizes = pieces or (weight.shape[cut],)
        counts = [min(n or dims.ranks, BANDS) for n in parts or (0,) * len(sizes)]
        bands = tuple(_bands(area, sizes, counts, colour, is_down=cut in down))
    label = weight.name[len(prefix) :] if prefix and weight.name.startswith(prefix) else weight.name
    label = label.removesuffix(".weight")
    return Box(
        _short(label), " x ".join(map(str, weight.shape)),
        f"{weight.name} [{', '.join(map(str, weight.shape))}]: {weight.held}", area, cut is not None, bands,
        tuple(_strips(dims, weight, area, down, across)), math.prod(weight.shape) // math.prod(
            [weight.shape[side] for side in (*down, *across)]
        ),
    )  # fmt: skip


def _sides(weight: Weight, cut: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dims that a rectangle shows downwards and across; others are matrices one behind the other."""
    own = [at for at, size in enumerate(weight.shape) if size > 1]
    if len(own) < 2:
        return tuple(own), ()
    if cut == own[0]:
        return (cut,), tuple(own[1:])
    return (own[-2],), (own[-1],)


def _length(size: int, largest: int) -> float:
    """Pixels: by the root, so that a small side is still seen beside a vocabulary."""
    return max(_LEAST, min(_MOST, _MOST * math.sqrt(size / largest))) if size > 1 else _FLAT


def _bands(
    area: Area, sizes: Sequence[int], counts: Sequence[int], colour: int, *, is_down: bool
) -> Iterator[Area]:
    """The parts of each piece; the first is the first rank's."""
    whole = area.height if is_down else area.width
    start = 0.0
    for size, count in zip(sizes, counts, strict=True):
        each = whole * size / sum(sizes) / count
        for rank in range(count):
            at = start + rank * each
            if is_down:
                yield Area(area.x, area.y + at, area.width, each, colour, rank == 0)
            else:
                yield Area(area.x + at, area.y, each, area.height, colour, rank == 0)
        start += each * count


def _strips(
    dims: Dims, weight: Weight, area: Area, down: tuple[int, ...], across: tuple[int, ...]
) -> Iterator[Area]:
    known = colours(dims)

    def colour(sides: tuple[int, ...]) -> int:
        own = [known[at] for side in sides for at in weight.classes[side] if at in known]
        return own[0] if own else _NEUTRAL

    if down:
        yield Area(area.x - _STRIP - 1, area.y, _STRIP, area.height, colour(down))
    if across:
        yield Area(area.x, area.y - _STRIP - 1, area.width, _STRIP, colour(across))


def _short(label: str) -> str:
    """A name that a group has room for: its end, which tells most."""
    return shown(label, _LONGEST) if len(label) <= _LONGEST else f"..{label[3 - _LONGEST :]}"
