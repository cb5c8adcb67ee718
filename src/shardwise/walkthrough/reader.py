"""What the words of a walk-through can name of its record: `{wire_rows}`, `{stranger.item}`,
`{kept_items:keeps the rows of id}`.

A name is a property of Reader, read in the phase of the step that is told. Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.core.walkthrough import Content, Matrix, Phase, Role, Row, StepKind, Walkthrough

FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


@dataclass(frozen=True, slots=True)
class PerRank:
    """Numbers of each rank, or a count. `{NAME:keeps the rows of id}` gives
    `rank 0 keeps the rows of ids 0 to 3 and rank 1 keeps the rows of ids 4 to 7`."""

    values: Sequence[Sequence[int] | int]

    def __format__(self, spec: str) -> str:
        verb, _, noun = spec.rpartition(" ")
        said = [
            count_of(value, noun) if isinstance(value, int) else span(value, noun) for value in self.values
        ]
        return listing([f"rank {rank} {verb} {text}" for rank, text in enumerate(said)])


@dataclass(frozen=True, slots=True)
class Reader:
    """A record, as the words of one phase read it."""

    walkthrough: Walkthrough
    phase: Phase

    def __getitem__(self, name: str) -> object:
        return getattr(self, name)

    def fill(self, words: str) -> str:
        """Words with all names replaced; a sentence begins with a capital, whatever its first name says."""
        return re.sub(r"(?:^|(?<=[.?] ))[a-z]", lambda first: first[0].upper(), words.format_map(self))

    # sizes

    @property
    def ranks(self) -> int:
        return self.walkthrough.sizes.ranks

    @property
    def hidden(self) -> int:
        return self.walkthrough.sizes.hidden

    @property
    def vocabulary(self) -> int | None:
        return self.walkthrough.sizes.vocabulary

    @property
    def tokens(self) -> int:
        return self.walkthrough.sizes.sequence

    @property
    def kept_bytes(self) -> int:
        """The most that one rank keeps of the parameter."""
        return max(held.parameter_bytes for held in self.walkthrough.held)

    @property
    def whole_bytes(self) -> int:
        whole = self._matrix(StepKind.GRADIENT, BACKWARD, None, Content.GRADIENT)
        return sum(len(row.values) for row in whole.rows) * self.walkthrough.sizes.element_bytes

    # what ranks have

    @property
    def ids(self) -> str:
        return ", ".join(map(str, self._ids()))

    @property
    def kept_items(self) -> PerRank:
        parts = self._per_rank(StepKind.CUT, FORWARD, Content.PARAMETER)
        return PerRank([[row.item for row in part.rows if row.item is not None] for part in parts])

    @property
    def kept_columns(self) -> PerRank:
        return PerRank([part.columns for part in self._per_rank(StepKind.CUT, FORWARD, Content.PARAMETER)])

    @property
    def result_tokens(self) -> PerRank:
        parts = self._per_rank(StepKind.RESULT, FORWARD, Content.OUTPUT)
        return PerRank([[row.token for row in part.rows if row.token is not None] for part in parts])

    @property
    def own_tokens(self) -> PerRank:
        parts = self._per_rank(StepKind.OWNERS, FORWARD, Content.LOCAL_ROWS)
        return PerRank([sum(row.role is Role.OWN for row in part.rows) for part in parts])

    @property
    def stranger_rank(self) -> int:
        return self._stranger()[0]

    @property
    def stranger(self) -> Row:
        """A token that a rank must end up with and whose row another rank owns."""
        return self._stranger()[1]

    @property
    def ignored_tokens(self) -> str:
        labels = self._matrix(StepKind.OWNERS, FORWARD, 0, Content.LOCAL_ROWS)
        return numbered("token", [row.token for row in labels.rows if row.role is Role.IGNORED])

    @property
    def loss(self) -> str:
        return number(self._matrix(StepKind.RESULT, FORWARD, 0, Content.OUTPUT).rows[0].values[0])

    # the id that comes most often

    @property
    def repeated_id(self) -> int:
        ids = self._ids()
        return max(ids, key=ids.count)

    @property
    def repeated_count(self) -> int:
        return self._ids().count(self.repeated_id)

    @property
    def repeated_tokens(self) -> str:
        return numbered("token", self._repeated())

    @property
    def repeated_sum(self) -> str:
        """How its gradient row is made of its tokens' gradients, in the first column."""
        given = {
            row.token: row.values[0]
            for part in self._per_rank(StepKind.GRADIENT_IN, BACKWARD, Content.OUTPUT_GRADIENT)
            for row in part.rows
        }
        total = next(
            row.values[0]
            for part in self._per_rank(StepKind.GRADIENT, BACKWARD, Content.GRADIENT)
            for row in part.rows
            if row.item == self.repeated_id
        )
        return f"{' + '.join(number(given[token]) for token in self._repeated())} = {number(total)}"

    # the wire

    @property
    def listed_rows(self) -> str:
        step = self.walkthrough.step(StepKind.ROUTE, self.phase)
        return count_of(sum(len(matrix.rows) for panel in step.panels for matrix in panel.holds), "row")

    @property
    def row_length(self) -> str:
        """Of a row that is sent."""
        block = self.walkthrough.step(StepKind.EXCHANGE, self.phase).of_rank(0).holds[0]
        return count_of(len(block.rows[0].values), "number")

    @property
    def sent_bytes(self) -> PerRank:
        return PerRank([self.walkthrough.sent_bytes(rank, self.phase) for rank in range(self.ranks)])

    @property
    def sent_rows(self) -> int:
        return self.walkthrough.sent_rows(self.phase)[0]

    @property
    def total_bytes(self) -> int:
        return sum(self.walkthrough.sent_bytes(rank, self.phase) for rank in range(self.ranks))

    @property
    def wire_rows(self) -> str:
        rows, zeros = self.walkthrough.sent_rows(self.phase)
        cross = "crosses" if rows == 1 else "cross"
        text = f"{count_of(rows, 'row')} {cross} the wire, {self.total_bytes} bytes in all"
        if not zeros:
            return text
        return f"{text}, and {zeros} of them {'is' if zeros == 1 else 'are'} nothing but zeros"

    def _matrix(self, kind: StepKind, phase: Phase, rank: int | None, content: Content) -> Matrix:
        panel = self.walkthrough.step(kind, phase).of_rank(rank)
        return next(matrix for matrix in (*panel.holds, *panel.gets) if matrix.content is content)

    def _per_rank(self, kind: StepKind, phase: Phase, content: Content) -> list[Matrix]:
        return [self._matrix(kind, phase, rank, content) for rank in range(self.ranks)]

    def _ids(self) -> list[int]:
        given = self._matrix(StepKind.INPUT, FORWARD, 0, Content.IDS)
        return [row.item for row in given.rows if row.item is not None]

    def _repeated(self) -> list[int]:
        return [token for token, item in enumerate(self._ids()) if item == self.repeated_id]

    def _stranger(self) -> tuple[int, Row]:
        parts = self._per_rank(StepKind.RESULT, FORWARD, Content.OUTPUT)
        return next((rank, row) for rank, part in enumerate(parts) for row in part.rows if row.owner != rank)


def number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def count_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def listing(texts: Sequence[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


def numbered(what: str, numbers: Sequence[int | None]) -> str:
    """`token 3`, `tokens 0 and 2`."""
    return (
        f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {listing([str(one) for one in numbers])}"
    )


def span(numbers: Sequence[int], what: str) -> str:
    """`ids 0 to 3` where they follow each other, `ids 0, 2 and 4` where not."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    return numbered(what, numbers) if numbers else f"no {what}s"
