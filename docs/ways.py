"""The picture of docs/rowwise-or-colwise.md: three ways to look up eight tokens on two ranks, drawn from the
toy's ids. One token is a bar of four numbers; blue numbers come from rank 0's part of the table, orange ones
from rank 1's, white ones are zeros.

Narrow and tall, so that a phone shows it at a size that one can read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "rowwise-or-colwise.svg"
WORDS = {"the": 0, "and": 1, "cat": 4, "dog": 5}
TEXT = (("the", "cat", "and", "the"), ("dog", "and", "the", "cat"))
"""Each rank's part of the sequence."""
LOOKS_UP = ("rank 0 looks up", "rank 1 looks up")
HEIGHT = 4  # numbers in a row of the table
ROWS = 8
OWNERS = "Ids 0 to 3: blue, of rank 0. Ids 4 to 7: orange, of rank 1."
WIDTH, MARGIN, CELL, UNIT = 400, 10, 23, 8
COLOURS = ("#2f6fb5", "#d9822b")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600;font-size:15px}"
    ".q{fill:#59636e;font-size:12px}.n{font-size:12px;text-anchor:middle}"
    ".z{fill:#fff;stroke:#8c959f;stroke-dasharray:2 2}"
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A token on a rank: whose number each of its four is; None: a zero; absent numbers aren't drawn."""

    id: int
    numbers: tuple[int | None, ...]
    above: int = 0  # numbers that are left out before the first


def owner(id_: int) -> int:
    return id_ * 2 // ROWS


def ids_of(rank: int) -> tuple[int, ...]:
    return tuple(WORDS[word] for word in TEXT[rank])


ALL = (*ids_of(0), *ids_of(1))


@dataclass(frozen=True, slots=True)
class Way:
    """A style on the toy: what each rank looks up (does says so), what it sends, and what it ends with. sent:
    numbers."""

    title: str
    does: tuple[str, str]
    looked_up: tuple[tuple[Bar, ...], ...]
    said: tuple[str, ...]
    sent: tuple[int, ...]
    ends: tuple[tuple[Bar, ...], ...]


def ways() -> tuple[Way, ...]:
    whole = tuple(tuple(Bar(id_, (owner(id_),) * HEIGHT) for id_ in ids_of(rank)) for rank in (0, 1))
    half = HEIGHT // 2
    rowwise = tuple(
        tuple(Bar(id_, (rank if owner(id_) == rank else None,) * HEIGHT) for id_ in ALL) for rank in (0, 1)
    )
    colwise = tuple(tuple(Bar(id_, (rank,) * half, rank * half) for id_ in ALL) for rank in (0, 1))
    halves = tuple(tuple(Bar(id_, (0,) * half + (1,) * half) for id_ in ids_of(rank)) for rank in (0, 1))
    needed = [sorted({id_ for id_ in ids_of(1 - rank) if owner(id_) == rank}) for rank in (0, 1)]
    routed = tuple(tuple(Bar(id_, (rank,) * HEIGHT) for id_ in needed[rank]) for rank in (0, 1))
    zeros = [sum(owner(id_) != rank for id_ in ids_of(1 - rank)) for rank in (0, 1)]
    part = len(ids_of(0))
    return (
        Way(
            "Rowwise: a rank has whole rows of some ids",
            LOOKS_UP,
            rowwise,
            tuple(f"sends {part} rows, {each} are zeros" for each in zeros),
            (part * HEIGHT,) * 2,
            whole,
        ),
        Way(
            "Colwise: a rank has a slice of every row",
            LOOKS_UP,
            colwise,
            (f"sends {part} half rows",) * 2,
            (part * half,) * 2,
            halves,
        ),
        Way(
            "Routed: rowwise, but only what is needed",
            ("rank 0, for rank 1", "rank 1, for rank 0"),
            routed,
            tuple(f"sends {len(each)} row{'s' * (len(each) > 1)}, each once" for each in needed),
            tuple(len(each) * HEIGHT for each in needed),
            whole,
        ),
    )


ADDED = ("added up", "put together", "put in their places")


def bars(found: Sequence[Bar], x: int, y: int) -> Iterator[str]:
    for number, bar in enumerate(found):
        left = x + number * CELL
        yield f'<text class="n" x="{left + CELL // 2 - 1}" y="{y}">{bar.id}</text>'
        for index, whose in enumerate(bar.numbers):
            top = y + 5 + (bar.above + index) * UNIT
            look = 'class="z"' if whose is None else f'fill="{COLOURS[whose]}" stroke="#fff"'
            yield f'<rect x="{left}" y="{top}" width="{CELL - 3}" height="{UNIT}" {look}/>'


def panel(way: Way, how: str, top: int) -> Iterator[str]:
    yield f'<text class="t" x="{MARGIN}" y="{top}">{escape(way.title)}</text>'
    for rank in (0, 1):
        x = MARGIN + rank * (WIDTH - MARGIN) // 2
        yield f'<text x="{x}" y="{top + 24}">{escape(way.does[rank])}</text>'
        yield from bars(way.looked_up[rank], x, top + 42)
        yield f'<text x="{x}" y="{top + 102}">{escape(way.said[rank])}</text>'
        yield f'<text class="q" x="{x}" y="{top + 119}">{way.sent[rank]} numbers · {escape(how)}:</text>'
        yield from bars(way.ends[rank], x, top + 138)


def picture() -> str:
    """The SVG, as text."""
    step, first = 208, 92
    height = first + 3 * step - 12
    words = " | ".join(" ".join(f"{word}({WORDS[word]})" for word in part) for part in TEXT)
    parts = [
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
        f'<text class="t" x="{MARGIN}" y="24">Eight tokens, two ranks</text>',
        f'<text class="q" x="{MARGIN}" y="42">{escape(words)}</text>',
        f'<text class="q" x="{MARGIN}" y="59">{OWNERS}</text>',
    ]
    for number, (way, how) in enumerate(zip(ways(), ADDED, strict=True)):
        parts += panel(way, how, first + number * step)
    about = "What each rank looks up, sends and ends with under rowwise, colwise and routed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{about}">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
