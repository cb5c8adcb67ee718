"""Walk-throughs of what takes more than one collective: a scene runs its toy itself, and makes the steps of
what each rank sent and got, turn by turn.

A scene for each kind of subject; which steps there are, and their words, is in the subject's file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shardwise.core.collective import CollectiveKind
from shardwise.core.walkthrough import (
    Content,
    Difference,
    Exchange,
    Held,
    Matrix,
    Panel,
    Phase,
    Role,
    Row,
    Sizes,
    Step,
    StepKind,
    Transfer,
)
from shardwise.walkthrough.thread_ranks import Exchanged

ALLOWED_ERROR = 1e-6
"""float32's rounding error over sums of a few products."""


Block = Callable[[int, int, Tensor], tuple[Sequence[Row], Sequence[int]]]
"""(source, destination, what was sent) -> the rows and columns of a matrix."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a scene's run comes to."""

    sizes: Sizes
    steps: tuple[Step, ...]
    held: tuple[Held, ...]


@dataclass(slots=True)
class Steps:
    """The steps so far. logs: each rank's collectives, in order."""

    logs: Sequence[Sequence[Exchanged]]
    made: list[Step] = field(default_factory=list)

    @property
    def ranks(self) -> range:
        return range(len(self.logs))

    def hold(self, phase: Phase, kind: StepKind, of: Callable[[int], Matrix]) -> None:
        """Where nothing travels: what each rank has."""
        self.made.append(Step(kind, phase, tuple(Panel(rank, (of(rank),)) for rank in self.ranks)))

    def compare(
        self,
        phase: Phase,
        kind: StepKind,
        of: Callable[[int | None], Matrix],
        parts: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """of: a rank's matrix, and the unsharded module's. parts: (a rank's, what it should have)."""
        panels = [Panel(rank, (of(rank),)) for rank in (*self.ranks, None)]
        largest = max(float((own - right).abs().max()) for own, right in parts)
        allowed = ALLOWED_ERROR * max(1.0, *(float(right.abs().max()) for _, right in parts))
        self.made.append(Step(kind, phase, tuple(panels), difference=Difference(largest, allowed)))

    def exchange(self, phase: Phase, part: str, number: int, block: Block, turn: int = 0) -> None:
        """Of the number-th collective of each rank."""
        now = [log[number] for log in self.logs]
        kind, origin = now[0].kind, now[0].origin
        to_one = kind is CollectiveKind.SEND
        panels, transfers = [], []
        for rank in self.ranks:
            holds, gets = [], []
            for peer in self.ranks:
                sent, received = now[rank].sent[peer], now[rank].received[peer]
                if not to_one or sent.numel():
                    rows, columns = block(rank, peer, sent)
                    holds.append(Matrix(Content.SENT, tuple(columns), tuple(rows), peer))
                    if peer != rank:
                        n_bytes = sent.nbytes
                        transfers.append(Transfer(rank, peer, len(rows), _zeros(rows), n_bytes))
                if not to_one or received.numel():
                    rows, columns = block(peer, rank, received)
                    role = Role.KEPT if peer == rank else Role.RECEIVED
                    came = tuple(Row(row.values, role, row.token, row.item) for row in rows)
                    gets.append(Matrix(Content.RECEIVED, tuple(columns), came, peer))
            panels.append(Panel(rank, tuple(holds), tuple(gets)))
        exchange = Exchange(kind, str(origin.before), str(origin.after), tuple(transfers))
        self.made.append(Step(StepKind.EXCHANGE, phase, tuple(panels), exchange, part=part, turn=turn))


def matrix(
    content: Content,
    values: Tensor,
    role: Role,
    *,
    tokens: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    owners: Sequence[int] | None = None,
) -> Matrix:
    """Rows of numbers; owners: the rank of each row's item."""
    rows = tuple(
        Row(
            tuple(float(value) for value in numbers),
            role,
            None if tokens is None else tokens[at],
            None if items is None else items[at],
            None if owners is None else owners[at],
        )
        for at, numbers in enumerate(values.tolist())
    )
    return Matrix(content, tuple(range(values.shape[1])), rows)


def rows_of(values: Tensor, tokens: Sequence[int], items: Sequence[int] | None = None) -> list[Row]:
    """Of a block on its way."""
    return [
        Row(tuple(numbers), Role.OWN, token, None if items is None else items[at])
        for at, (numbers, token) in enumerate(zip(values.tolist(), tokens, strict=True))
    ]


def _zeros(rows: Sequence[Row]) -> int:
    return sum(not any(row.values) for row in rows)
