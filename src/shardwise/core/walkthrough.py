"""Walkthrough: one module under one style on a few ranks, step by step, with every number that the ranks
really had.

A step holds a panel per rank; a panel holds small matrices: what the rank has before the step's collective
(`holds`) and what it has after it (`gets`). Numbers and roles only: the words are in walkthrough/. Bytes of a
transfer are those of the buffers that were handed to the collective; for an all-reduce, which no rank sends
whole to another, they are the ring's share (core/collective.py). What this file does not know: time, and
sizes that are not toys.
"""

from dataclasses import dataclass
from enum import StrEnum

from shardwise.core.collective import CollectiveKind


class Phase(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"


class StepKind(StrEnum):
    """CUT: what a rank keeps of the parameter. INPUT: what it is given. OWNERS: which of it is its own.
    ROUTE: which rows go where. COMPUTE: what it works out by itself. EXCHANGE: a collective. EXPAND: received
    rows to tokens. RESULT, INPUT_GRADIENT, GRADIENT: what it ends with, beside the unsharded module's.
    GRADIENT_IN: the gradient of its output."""

    CUT = "cut"
    INPUT = "input"
    OWNERS = "owners"
    ROUTE = "route"
    COMPUTE = "compute"
    EXCHANGE = "exchange"
    EXPAND = "expand"
    RESULT = "result"
    GRADIENT_IN = "gradient_in"
    INPUT_GRADIENT = "input_gradient"
    GRADIENT = "gradient"


class Content(StrEnum):
    """What a matrix is. SENT: a block for `peer`. RECEIVED: a block from `peer`. MEETS: when a token meets
    another's. LANES: what a rank works on, slot by slot. MADE: what a rank works out for other ranks."""

    PARAMETER = "parameter"
    INPUT = "input"
    IDS = "ids"
    LOCAL_ROWS = "local_rows"
    ROUTE = "route"
    EXPAND = "expand"
    MEETS = "meets"
    LANES = "lanes"
    MADE = "made"
    SENT = "sent"
    RECEIVED = "received"
    PARTIAL = "partial"
    SUM = "sum"
    OUTPUT = "output"
    STATISTICS = "statistics"
    OUTPUT_GRADIENT = "output_gradient"
    INPUT_GRADIENT = "input_gradient"
    GRADIENT = "gradient"


class Role(StrEnum):
    """How a row came to be where it is.

    given: put in from outside. own: this rank's own work or property. zero: zeros, since another rank owns
    it. kept: stayed here in an exchange. received: came from another rank. partial: a summand of which other
    ranks have the others. summed: over the ranks. untouched: a gradient of which no token knows. ignored:
    doesn't count.
    """

    GIVEN = "given"
    OWN = "own"
    ZERO = "zero"
    KEPT = "kept"
    RECEIVED = "received"
    PARTIAL = "partial"
    SUMMED = "summed"
    UNTOUCHED = "untouched"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Row:
    """token: position in the sequence. item: row of the parameter (token id, output feature). owner: the rank
    that owns the item.

    A value is None where there is none, such as the local row of an id that the rank does not own.
    """

    values: tuple[float | None, ...]
    role: Role
    token: int | None = None
    item: int | None = None
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class Matrix:
    """columns: their numbers in the whole tensor; column_owners: their ranks; () where they have none."""

    content: Content
    columns: tuple[int, ...]
    rows: tuple[Row, ...]
    peer: int | None = None
    column_owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        widths = {len(row.values) for row in self.rows}
        if len(widths) > 1 or (self.columns and widths - {len(self.columns)}):
            raise ValueError(
                f"matrix {self.content}: rows have {sorted(widths)} values "
                f"and there are {len(self.columns)} columns"
            )
        if self.column_owners and len(self.column_owners) != len(self.columns):
            raise ValueError(
                f"matrix {self.content}: {len(self.column_owners)} column owners "
                f"for {len(self.columns)} columns"
            )


@dataclass(frozen=True, slots=True)
class Panel:
    """What one rank has in a step; rank None is the unsharded module."""

    rank: int | None
    holds: tuple[Matrix, ...] = ()
    gets: tuple[Matrix, ...] = ()


@dataclass(frozen=True, slots=True)
class Transfer:
    """What `source` sends to another rank in one collective. zero_rows: how many of the rows are nothing but
    zeros.

    Rows are None for an all-reduce: a ring sends shares of sums, not rows.
    """

    source: int
    destination: int
    rows: int | None
    zero_rows: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """A collective that the style issued, and the change of placement that it was issued for (in backward:
    the forward's, which it undoes)."""

    collective: CollectiveKind
    before: str
    after: str
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest difference from the unsharded module, over all ranks; infinite where the shapes differ."""

    largest: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.largest <= self.allowed


@dataclass(frozen=True, slots=True)
class Step:
    """part: which of several steps of one kind in a phase; turn: of a step that is done several times, from 1
    on; 0 where it is done once."""

    kind: StepKind
    phase: Phase
    panels: tuple[Panel, ...]
    exchange: Exchange | None = None
    difference: Difference | None = None
    part: str = ""
    turn: int = 0

    def of_rank(self, rank: int | None) -> Panel:
        return next(panel for panel in self.panels if panel.rank == rank)


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank keeps of the parameter and of the gradient (for a loss, of the logits)."""

    rank: int
    parameter_shape: tuple[int, ...]
    parameter_bytes: int
    gradient_shape: tuple[int, ...]
    gradient_bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """vocabulary: rows of a table, columns of logits; features: of a linear's output; experts: of a mixture;
    None for others."""

    ranks: int
    batch: int
    sequence: int
    hidden: int
    element_bytes: int
    vocabulary: int | None = None
    features: int | None = None
    experts: int | None = None


@dataclass(frozen=True, slots=True)
class Walkthrough:
    """subject: a kind of module and a style, "embedding/rowwise". module: its name in the user's model."""

    subject: str
    module: str
    sizes: Sizes
    steps: tuple[Step, ...]
    held: tuple[Held, ...]

    def sent_bytes(self, rank: int, phase: Phase) -> int:
        return sum(transfer.bytes for transfer in self._transfers(phase) if transfer.source == rank)

    def sent_rows(self, phase: Phase) -> tuple[int, int]:
        """(rows, rows of zeros) that all ranks send together in a phase, as far as rows are sent."""
        transfers = self._transfers(phase)
        rows = sum(transfer.rows or 0 for transfer in transfers)
        return rows, sum(transfer.zero_rows or 0 for transfer in transfers)

    @property
    def agrees(self) -> bool:
        return all(step.difference.agrees for step in self.steps if step.difference is not None)

    def step(self, kind: StepKind, phase: Phase) -> Step:
        return next(step for step in self.steps if step.kind == kind and step.phase == phase)

    def _transfers(self, phase: Phase) -> tuple[Transfer, ...]:
        return tuple(
            transfer
            for step in self.steps
            if step.phase == phase and step.exchange is not None
            for transfer in step.exchange.transfers
        )
