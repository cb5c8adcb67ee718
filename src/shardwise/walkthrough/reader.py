"""What the sentences of a walk-through want to know of its record, and how they say numbers. Imports no torch."""

from collections.abc import Callable, Iterable

from shardwise.core.walkthrough import (
    Content,
    Exchange,
    Matrix,
    Panel,
    Phase,
    Role,
    Row,
    StepKind,
    Walkthrough,
)

FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


class Reader:
    """What sentences want to know of a record."""

    def __init__(self, walkthrough: Walkthrough) -> None:
        self.walkthrough = walkthrough
        self.sizes = walkthrough.sizes
        self.T = walkthrough.sizes.ranks
        self.ranks = range(self.T)

    def panel(self, kind: StepKind, phase: Phase, rank: int | None) -> Panel:
        return self.walkthrough.step(kind, phase).of_rank(rank)

    def matrix(self, kind: StepKind, phase: Phase, rank: int | None, content: Content) -> Matrix:
        panel = self.panel(kind, phase, rank)
        return next(matrix for matrix in (*panel.holds, *panel.gets) if matrix.content is content)

    def ids(self) -> list[int]:
        return [
            row.item
            for row in self.matrix(StepKind.INPUT, FORWARD, 0, Content.IDS).rows
            if row.item is not None
        ]

    def kept_items(self, rank: int) -> list[int]:
        return [
            row.item
            for row in self.matrix(StepKind.CUT, FORWARD, rank, Content.PARAMETER).rows
            if row.item is not None
        ]

    def kept_columns(self, rank: int) -> tuple[int, ...]:
        return self.matrix(StepKind.CUT, FORWARD, rank, Content.PARAMETER).columns

    def result_tokens(self, rank: int) -> list[int]:
        return [
            row.token
            for row in self.matrix(StepKind.RESULT, FORWARD, rank, Content.OUTPUT).rows
            if row.token is not None
        ]

    def each(self, text: Callable[[int], str]) -> str:
        """`rank 0 TEXT, rank 1 TEXT and rank 2 TEXT`."""
        return listing(f"rank {rank} {text(rank)}" for rank in self.ranks)

    def spans(self, verb: str, numbers_of: Callable[[int], Iterable[int]], what: str) -> str:
        """`rank 0 keeps ids 0 to 3 and rank 1 keeps ids 4 to 7`."""
        return self.each(lambda rank: f"{verb} {span(numbers_of(rank), what)}")

    def owned(self) -> str:
        """`rank 0 owns the row of 3 tokens and rank 1 ...`."""
        return self.each(lambda rank: f"owns the row of {count_of(self.own_tokens(rank), 'token')}")

    def kept_bytes(self) -> tuple[int, int]:
        """(most that one rank keeps, the whole parameter), in bytes."""
        whole = self.matrix(StepKind.GRADIENT, BACKWARD, None, Content.GRADIENT)
        size = sum(len(row.values) for row in whole.rows) * self.sizes.element_bytes
        return max(held.parameter_bytes for held in self.walkthrough.held), size

    def own_tokens(self, rank: int) -> int:
        rows = self.matrix(StepKind.OWNERS, FORWARD, rank, Content.LOCAL_ROWS).rows
        return sum(row.role is Role.OWN for row in rows)

    def stranger(self) -> tuple[int, Row] | None:
        """(rank, row): a token that a rank must end up with and whose row another rank owns."""
        for rank in self.ranks:
            for row in self.matrix(StepKind.RESULT, FORWARD, rank, Content.OUTPUT).rows:
                if row.owner not in (None, rank):
                    return rank, row
        return None

    def repeated(self) -> tuple[int, list[int]] | None:
        """(id, its tokens): the id that comes most often, if any comes twice."""
        ids = self.ids()
        most = max(ids, key=ids.count)
        tokens = [token for token, item in enumerate(ids) if item == most]
        return (most, tokens) if len(tokens) > 1 else None

    def sum_of_repeated(self) -> str:
        """How the gradient row of an id that comes several times is made of its tokens' gradients."""
        found = self.repeated()
        if found is None:
            return ""
        item, tokens = found
        given = {
            row.token: row.values[0]
            for rank in self.ranks
            for row in self.matrix(StepKind.GRADIENT_IN, BACKWARD, rank, Content.OUTPUT_GRADIENT).rows
        }
        rows = (
            row
            for rank in self.ranks
            for row in self.matrix(StepKind.GRADIENT, BACKWARD, rank, Content.GRADIENT).rows
        )
        total = next(row.values[0] for row in rows if row.item == item)
        terms = " + ".join(number(given[token]) for token in tokens)
        return (
            f"Id {item} stands at {numbered('token', tokens)}, so its row gets the sum of their gradients: {terms} = {number(total)} "
            "in the first column."
        )

    def exchange(self, phase: Phase) -> Exchange:
        exchange = self.walkthrough.step(StepKind.EXCHANGE, phase).exchange
        assert exchange is not None
        return exchange

    def wire_rows(self, phase: Phase) -> str:
        rows, zeros = self.walkthrough.sent_rows(phase)
        text = f"{count_of(rows, 'row')} cross{'es' if rows == 1 else ''} the wire, {self.total_bytes(phase)} bytes in all"
        return (
            f"{text}, and {zeros} of them {'is' if zeros == 1 else 'are'} nothing but zeros"
            if zeros
            else text
        )

    def total_bytes(self, phase: Phase) -> int:
        return sum(self.walkthrough.sent_bytes(rank, phase) for rank in self.ranks)


def number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def count_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def commas(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def listing(texts: Iterable[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


def numbered(what: str, numbers: list[int]) -> str:
    """`token 3`, `tokens 0 and 2`."""
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {listing(map(str, numbers))}"


def span(numbers: Iterable[int], what: str) -> str:
    """`ids 0 to 3` where they follow each other, `ids 0, 2 and 4` where not."""
    found = list(numbers)
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{what}s {found[0]} to {found[-1]}"
    return numbered(what, found) if found else f"no {what}s"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
