"""The steps of a walk-through, read off the runs of its toy: what every rank has at each, as matrices.

Every step of a phase is made by the kind of step that it is; what is special to a style shows in what it let
be seen (Run.shown): whose rows, which route.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.errors import RunError
from shardwise.core.walkthrough import (
    Content,
    Difference,
    Exchange,
    Matrix,
    Panel,
    Phase,
    Role,
    Step,
    StepKind,
    Transfer,
)
from shardwise.parallel.styles.rowwise import NO_ROW
from shardwise.walkthrough.layout import Layout, Place
from shardwise.walkthrough.run import Run
from shardwise.walkthrough.subject import Wire
from shardwise.walkthrough.thread_ranks import Exchanged
from shardwise.walkthrough.toy import Rows, Toy

# float32's rounding error over sums of a few products; sums of small whole numbers are exact
ALLOWED_ERROR = 1e-6

# steps that show one tensor as it is -> (its name in a Run, what it is called in the record, its role)
_SHOWN_AS_IT_IS = {
    StepKind.CUT: ("parameter", Content.PARAMETER, Role.OWN),
    StepKind.INPUT: ("input", Content.INPUT, Role.GIVEN),
    StepKind.GRADIENT_IN: ("output_gradient", Content.OUTPUT_GRADIENT, Role.GIVEN),
}
# steps that compare a tensor with the unsharded module's
_COMPARED = {
    StepKind.RESULT: ("output", Content.OUTPUT),
    StepKind.INPUT_GRADIENT: ("input_gradient", Content.INPUT_GRADIENT),
    StepKind.GRADIENT: ("gradient", Content.GRADIENT),
}

Matrices = tuple[Matrix, ...]


class Steps:
    """Of one recorded run. whole: the unsharded module's."""

    def __init__(self, toy: Toy, whole: Run, runs: Sequence[Run]) -> None:
        self.toy = toy
        self.whole = whole
        self.runs = runs
        self.ranks = range(toy.ranks)
        self.layout = Layout(toy)
        self.matrix = self.layout.matrix
        self.is_embedding = toy.subject.kind == "embedding"
        for phase in Phase:
            self._check_collectives(phase)

    def all(self) -> list[Step]:
        return [self._step(told.phase, told.kind) for told in self.toy.subject.steps]

    def _step(self, phase: Phase, kind: StepKind) -> Step:
        if kind in _COMPARED:
            return self._compared(phase, kind)
        if kind is StepKind.EXCHANGE:
            return self._exchange(phase)
        if kind is StepKind.EXPAND:
            panels = [Panel(rank, self._received(phase, rank), (self._expand(rank),)) for rank in self.ranks]
        else:
            panels = [Panel(rank, self._held(phase, kind, rank)) for rank in self.ranks]
        return Step(kind, phase, tuple(panels))

    def _held(self, phase: Phase, kind: StepKind, rank: int) -> Matrices:
        """What a rank has in a step where nothing travels."""
        run = self.runs[rank]
        match kind:
            case StepKind.INPUT if self.is_embedding:
                return (self._ids(run.input, Role.GIVEN, self.layout.all_tokens),)
            case StepKind.OWNERS:
                return (self._owners(rank),)
            case StepKind.ROUTE:
                return self._routes(rank)
            case StepKind.COMPUTE:
                return self._sent(phase, rank)
            case _:
                tensor, content, role = _SHOWN_AS_IT_IS[kind]
                return (self.matrix(content, getattr(run, tensor), role, self.layout.of(tensor, rank)),)

    # what a style let be seen

    def _ids(self, ids: Tensor, role: Role, tokens: Sequence[int]) -> Matrix:
        return self.matrix(Content.IDS, ids.double(), role, self.layout.of_tokens(tokens))

    def _owners(self, rank: int) -> Matrix:
        """Which tokens' rows (labels' columns) a rank has, and where; or the ids that it looks up."""
        shown = self.runs[rank].shown
        if "own_ids" in shown:
            return self._ids(shown["own_ids"], Role.OWN, self.layout.tokens[rank])
        place = self.layout.of_tokens(self.layout.all_tokens)
        items = place.items or ()
        numbers = shown["own_rows" if "own_rows" in shown else "own_columns"].flatten().tolist()
        roles = [
            Role.IGNORED if item is None else Role.OWN if number >= 0 else Role.ZERO
            for item, number in zip(items, numbers, strict=True)
        ]
        values = [[float(number) if number >= 0 else None] for number in numbers]
        return self.matrix(Content.LOCAL_ROWS, values, roles, place)

    def _send_rows(self, rank: int) -> list[Tensor]:
        """A routed table's rows that a rank sends to each destination."""
        sizes = [len(block) for block in self._exchanged(Phase.FORWARD, rank).sent]
        return list(self.runs[rank].shown["send_rows"].split(sizes))

    def _routes(self, rank: int) -> Matrices:
        return tuple(
            self.matrix(
                Content.ROUTE,
                rows.double(),
                Role.KEPT if to == rank else Role.OWN,
                self._routed_place(rank, to, columns=()),
                peer=to,
            )
            for to, rows in enumerate(self._send_rows(rank))
        )

    def _routed_place(self, owner: int, asker: int, columns: Sequence[int]) -> Place:
        own = self.layout.items[owner]
        return Place(None, [own[int(row)] for row in self._send_rows(owner)[asker]], columns)

    def _expand(self, rank: int) -> Matrix:
        place = self.layout.of_tokens(self.layout.tokens[rank])
        return self.matrix(Content.EXPAND, self.runs[rank].shown["expand"].double(), Role.OWN, place)

    def _statistics(self, rank: int) -> Matrices:
        """The log-sum and the loss of each token, where a style shows them."""
        shown = self.runs[rank].shown
        if "lse" not in shown:
            return ()
        place = self.layout.of_tokens(self.layout.all_tokens)
        roles = [Role.IGNORED if item is None else Role.SUMMED for item in place.items or ()]
        return (
            self.matrix(Content.STATISTICS, torch.stack((shown["lse"], shown["losses"]), 1), roles, place),
        )

    # what travels

    def _check_collectives(self, phase: Phase) -> None:
        """Raises RunError unless every rank issued the phase's one collective, or none where none is."""
        wire = self.toy.subject.wire(phase)
        for rank, run in enumerate(self.runs):
            kinds = [exchanged.kind for exchanged in run.exchanges[phase]]
            if kinds != ([] if wire is None else [wire.collective]):
                expected = "none" if wire is None else f"one {wire.collective}"
                issued = ", ".join(kinds) or "none"
                raise RunError(
                    f"walk-through {self.toy.subject.name}: rank {rank} issued {issued} in {phase}, "
                    f"where {expected} was expected."
                )

    def _wire(self, phase: Phase) -> Wire:
        wire = self.toy.subject.wire(phase)
        assert wire is not None
        return wire

    def _exchanged(self, phase: Phase, rank: int) -> Exchanged:
        return self.runs[rank].exchanges[phase][0]

    def _sent(self, phase: Phase, rank: int) -> Matrices:
        """The blocks that a rank lays down: one for each destination, or one for all."""
        wire = self._wire(phase)
        match wire.collective:
            case CollectiveKind.ALL_REDUCE:
                touched = self.runs[rank].shown.get("own_ids", torch.empty(0)).flatten().tolist()
                summand = self._exchanged(phase, rank).sent[0]
                return (self._gradient(Content.PARTIAL, summand, wire.role, None, touched),)
            case CollectiveKind.ALL_GATHER:
                return (self._block(phase, Content.SENT, rank, rank, wire.role, None),)
            case _:
                return tuple(self._block(phase, Content.SENT, rank, to, wire.role, to) for to in self.ranks)

    def _received(self, phase: Phase, rank: int) -> Matrices:
        """The block from each source, and the sum where there is one."""
        exchanged = self._exchanged(phase, rank)
        if exchanged.kind is CollectiveKind.ALL_REDUCE:
            return (self._gradient(Content.SUM, exchanged.result, Role.SUMMED, None, self.toy.items() or ()),)
        came = [
            self._block(phase, Content.RECEIVED, source, rank, role, source)
            for source in self.ranks
            for role in [Role.KEPT if source == rank else Role.RECEIVED]
        ]
        if exchanged.kind is CollectiveKind.REDUCE_SCATTER:
            place = self._place(phase, rank, rank)
            came.append(self.matrix(Content.SUM, exchanged.result, Role.SUMMED, place))
        return tuple(came)

    def _block(
        self, phase: Phase, content: Content, source: int, destination: int, role: Role, peer: int | None
    ) -> Matrix:
        place = self._place(phase, source, destination)
        values = self.toy.block_rows(self._exchanged(phase, source).sent[destination])
        if source == destination and place.are_columns_owned:
            # what stays never takes part in the all-to-all: it lies in the output already
            run = self.runs[source]
            whole = run.output if phase is Phase.FORWARD else run.output_gradient
            values = whole[:, list(place.columns)]
        own_rows = self.runs[source].shown.get("own_rows")
        if own_rows is None or phase is Phase.BACKWARD:
            return self.matrix(content, values, role, place, peer)
        owned = (own_rows.flatten() != NO_ROW).tolist()
        masked = [role if owned[token] else Role.ZERO for token in place.tokens or ()]
        return self.matrix(content, values, masked, place, peer)

    def _place(self, phase: Phase, source: int, destination: int) -> Place:
        """What the block from source to destination is of."""
        layout, columns = self.layout, range(self.toy.hidden)
        match self._wire(phase).collective:
            case CollectiveKind.ALL_GATHER if self.toy.parameter_rows is Rows.TOKENS:
                # two numbers of every token, whoever has the logit of its label
                return layout.of_tokens(layout.all_tokens)
            case CollectiveKind.ALL_GATHER:
                return layout.of_tokens(layout.tokens[source], columns)
            case CollectiveKind.REDUCE_SCATTER:
                return layout.of_tokens(layout.tokens[destination], columns)
            case _:
                owner, asker = (source, destination) if phase is Phase.FORWARD else (destination, source)
                if "send_rows" in self.runs[owner].shown:
                    return self._routed_place(owner, asker, columns)
                return layout.of_tokens(layout.tokens[asker], layout.columns[owner], are_columns_owned=True)

    def _exchange(self, phase: Phase) -> Step:
        origin = self._exchanged(phase, 0).origin
        kind = self._wire(phase).collective
        transfers = [
            self._transfer(phase, source, to) for source in self.ranks for to in self.ranks if source != to
        ]
        panels = tuple(
            Panel(rank, self._sent(phase, rank), self._received(phase, rank)) for rank in self.ranks
        )
        exchange = Exchange(kind, str(origin.before), str(origin.after), tuple(transfers))
        return Step(StepKind.EXCHANGE, phase, panels, exchange)

    def _transfer(self, phase: Phase, source: int, destination: int) -> Transfer:
        exchanged = self._exchanged(phase, source)
        block = exchanged.sent[destination]
        if exchanged.kind is CollectiveKind.ALL_REDUCE:
            share = wire_bytes(exchanged.kind, block.nbytes, self.toy.ranks) / (self.toy.ranks - 1)
            return Transfer(source, destination, None, None, round(share))
        height = self._place(phase, source, destination).height
        zero_rows = int((self.toy.block_rows(block).reshape(height, -1) == 0).all(1).sum()) if height else 0
        return Transfer(source, destination, height, zero_rows, block.nbytes)

    # beside the unsharded module

    def _compared(self, phase: Phase, kind: StepKind) -> Step:
        tensor, content = _COMPARED[kind]
        # what no rank has cut is whole only because it was added up; a table's rows are a rank's own work all
        # the same
        is_cut = self.is_embedding or self.layout.is_cut(tensor)
        role = Role.OWN if is_cut else Role.SUMMED

        def matrix(run: Run, rank: int | None) -> Matrix:
            values: Tensor = getattr(run, tensor)
            if kind is StepKind.GRADIENT:
                return self._gradient(content, values, role, rank, self.toy.items() or ())
            return self.matrix(content, values, role, self.layout.of(tensor, rank))

        panels = []
        for rank, run in enumerate(self.runs):
            before = self._statistics(rank) if kind is StepKind.RESULT else ()
            panels.append(Panel(rank, (*before, matrix(run, rank))))
        panels.append(Panel(None, (matrix(self.whole, None),)))
        return Step(kind, phase, tuple(panels), difference=self._difference(tensor))

    def _gradient(
        self, content: Content, values: Tensor, role: Role, rank: int | None, touched: Sequence[int | None]
    ) -> Matrix:
        """Of the parameter. touched: the ids that tokens had, which alone are in a table's gradient."""
        place = self.layout.of("gradient", rank)
        if not self.is_embedding:
            return self.matrix(content, values, role, place)
        roles = [role if item in touched else Role.UNTOUCHED for item in place.items or ()]
        return self.matrix(content, values, roles, place)

    def _difference(self, tensor: str) -> Difference:
        expected: Tensor = getattr(self.whole, tensor)
        largest = 0.0
        for rank, run in enumerate(self.runs):
            part = self.layout.part(tensor, expected, rank)
            actual: Tensor = getattr(run, tensor)
            if actual.shape != part.shape:
                return Difference(float("inf"), 0.0)
            largest = max(largest, float((actual - part).abs().max()))
        return Difference(largest, ALLOWED_ERROR * max(1.0, float(expected.abs().max())))
