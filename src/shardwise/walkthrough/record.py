"""Runs a style for real on a toy module and a few ranks, and records what every rank has at each step: Subject -> Walkthrough.

The toys and their runs are walkthrough_toy.py's; here every step's matrices are read off the runs.

Suffixes: T ranks, S sequence (a batch of one), H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardwise.core.collective import CollectiveKind, wire_bytes
from shardwise.core.errors import OptionError, RunError
from shardwise.core.plan import suggest
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
    Subject,
    Transfer,
    Walkthrough,
)
from shardwise.parallel.collectives import chunk_sizes
from shardwise.parallel.embedding import NO_ROW
from shardwise.parallel.loss import IGNORED
from shardwise.walkthrough.thread_ranks import Exchanged, on_threads
from shardwise.walkthrough.toy import VOCABULARY, Run, Toy, run_rank, run_whole

RANKS = (2, 3, 4)

# float32's rounding error over sums of a few products; sums of small whole numbers are exact
ALLOWED_ERROR = 1e-6

# the module names that a Llama has at these places
_MODULES = {
    Subject.LINEAR_COLWISE: "layers.0.feed_forward.w1",
    Subject.LINEAR_ROWWISE: "layers.0.feed_forward.w2",
    Subject.NORM_SEQUENCE_PARALLEL: "layers.0.attention_norm",
    Subject.LOSS_VOCAB_PARALLEL: "loss",
}


def record_walkthrough(subject: Subject | str, *, ranks: int = 2, module: str | None = None) -> Walkthrough:
    """Runs the subject's style on `ranks` ranks (2, 3 or 4) and records it. module: the name to call the module by.

    Raises OptionError for an unknown subject or another number of ranks.
    """
    try:
        subject = Subject(subject)
    except ValueError:
        allowed = [str(known) for known in Subject]
        raise OptionError(
            f'walk-through "{subject}" is unknown.{suggest(str(subject), allowed)} Allowed: {", ".join(allowed)}.'
        ) from None
    if ranks not in RANKS:
        raise OptionError(
            f"a walk-through on {ranks} ranks is not offered. Allowed: {', '.join(map(str, RANKS))}."
        )
    toy = Toy(subject, ranks)
    whole = on_threads(1, lambda *_: run_whole(toy))[0]
    runs = on_threads(ranks, lambda rank, mesh, log: run_rank(toy, rank, mesh, log))
    builder = _Builder(toy, whole, runs)
    return Walkthrough(
        subject=subject,
        module=module or _MODULES.get(subject, "tok_embeddings"),
        sizes=Sizes(
            ranks=ranks,
            batch=1,
            sequence=toy.sequence,
            hidden=toy.hidden,
            element_bytes=whole.parameter.element_size(),
            vocabulary=VOCABULARY if toy.has_vocabulary else None,
            features=toy.hidden if toy.is_linear else None,
        ),
        steps=tuple(builder.steps()),
        held=tuple(builder.held()),
    )


class _Builder:
    """Steps of one recorded run."""

    def __init__(self, toy: Toy, whole: Run, runs: list[Run]) -> None:
        self.toy = toy
        self.whole = whole
        self.runs = runs
        self.T = toy.ranks
        self.tokens = [list(range(part * toy.per_rank, (part + 1) * toy.per_rank)) for part in range(self.T)]
        self.all_tokens = list(range(toy.sequence))
        sizes = chunk_sizes(VOCABULARY if toy.kind == "loss" else toy.hidden, self.T)
        starts = [sum(sizes[:rank]) for rank in range(self.T)]
        self.columns = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        self.column_owners = [rank for rank, size in enumerate(sizes) for _ in range(size)]
        self.ids = [list(toy.ownership.ids_of(rank).tolist()) for rank in range(self.T)]
        self.owner = {item: rank for rank, items in enumerate(self.ids) for item in items}

    def steps(self) -> list[Step]:
        match self.toy.subject:
            case Subject.EMBEDDING_ROWWISE:
                return self._embedding_rowwise()
            case Subject.EMBEDDING_COLWISE:
                return self._embedding_colwise()
            case Subject.EMBEDDING_ROUTED | Subject.EMBEDDING_ROUTED_INTERLEAVED:
                return self._embedding_routed()
            case Subject.EMBEDDING_REPLICATED:
                return self._embedding_replicated()
            case Subject.LINEAR_COLWISE:
                return self._linear_colwise()
            case Subject.LINEAR_ROWWISE:
                return self._linear_rowwise()
            case Subject.NORM_SEQUENCE_PARALLEL:
                return self._norm()
            case Subject.LOSS_VOCAB_PARALLEL:
                return self._loss()

    def held(self) -> list[Held]:
        return [
            Held(
                rank,
                tuple(run.parameter.shape),
                _bytes(run.parameter),
                tuple(run.gradient.shape),
                _bytes(run.gradient),
            )
            for rank, run in enumerate(self.runs)
        ]

    def _embedding_rowwise(self) -> list[Step]:
        forward = self._only(Phase.FORWARD, CollectiveKind.REDUCE_SCATTER)
        backward = self._only(Phase.BACKWARD, CollectiveKind.ALL_GATHER)
        own_rows = [run.shown["own_rows"].flatten().tolist() for run in self.runs]

        def roles(rank: int, tokens: Sequence[int], own: Role) -> list[Role]:
            return [own if own_rows[rank][token] != NO_ROW else Role.ZERO for token in tokens]

        def block(content: Content, source: int, destination: int, own: Role) -> Matrix:
            peer = destination if content is Content.SENT else source
            tokens = self.tokens[destination]
            return self._of_tokens(
                content, forward[source].sent[destination], tokens, roles(source, tokens, own), peer=peer
            )

        sent = [
            tuple(block(Content.SENT, rank, to, Role.OWN) for to in range(self.T)) for rank in range(self.T)
        ]
        gets = [
            (
                *(
                    block(Content.RECEIVED, source, rank, Role.KEPT if source == rank else Role.RECEIVED)
                    for source in range(self.T)
                ),
                self._of_tokens(Content.SUM, forward[rank].result, self.tokens[rank], Role.SUMMED),
            )
            for rank in range(self.T)
        ]
        local_rows = [
            self._matrix(
                Content.LOCAL_ROWS,
                [[None if row == NO_ROW else float(row)] for row in own_rows[rank]],
                roles(rank, self.all_tokens, Role.OWN),
                tokens=self.all_tokens,
                items=self._items(self.all_tokens),
            )
            for rank in range(self.T)
        ]
        gathered = [
            tuple(
                self._of_tokens(
                    Content.RECEIVED,
                    backward[rank].received[source],
                    self.tokens[source],
                    Role.KEPT if source == rank else Role.RECEIVED,
                    peer=source,
                )
                for source in range(self.T)
            )
            for rank in range(self.T)
        ]
        gradients = [
            (self._of_tokens(Content.SENT, backward[rank].sent[0], self.tokens[rank], Role.GIVEN),)
            for rank in range(self.T)
        ]
        return [
            self._cut(self._row_cut_table),
            self._id_step(),
            self._local(StepKind.OWNERS, Phase.FORWARD, [(matrix,) for matrix in local_rows]),
            self._local(StepKind.COMPUTE, Phase.FORWARD, sent),
            self._exchange(Phase.FORWARD, forward, sent, gets, self.toy.hidden),
            self._token_result(),
            self._gradient_in(),
            self._exchange(Phase.BACKWARD, backward, gradients, gathered, self.toy.hidden),
            self._table_gradient(),
        ]

    def _embedding_colwise(self) -> list[Step]:
        forward = self._only(Phase.FORWARD, CollectiveKind.ALL_TO_ALL)
        backward = self._only(Phase.BACKWARD, CollectiveKind.ALL_TO_ALL)

        def forward_block(source: int, destination: int, content: Content) -> Matrix:
            peer = destination if content is Content.SENT else source
            role = (
                Role.OWN if content is Content.SENT else Role.KEPT if source == destination else Role.RECEIVED
            )
            # what stays never takes part in the all-to-all: it lies in the output already
            kept = self.runs[source].output[:, self.columns[source]]
            values = kept if source == destination else forward[source].sent[destination]
            return self._slices(content, values, self.tokens[destination], source, role, peer)

        def backward_block(source: int, destination: int, content: Content) -> Matrix:
            peer = destination if content is Content.SENT else source
            role = (
                Role.GIVEN
                if content is Content.SENT
                else Role.KEPT
                if source == destination
                else Role.RECEIVED
            )
            kept = self.runs[source].output_gradient[:, self.columns[source]]
            values = kept if source == destination else backward[source].sent[destination]
            return self._slices(content, values, self.tokens[source], destination, role, peer)

        def blocks(
            block: Callable[[int, int, Content], Matrix], content: Content
        ) -> list[tuple[Matrix, ...]]:
            return [
                tuple(
                    block(rank, peer, content) if content is Content.SENT else block(peer, rank, content)
                    for peer in range(self.T)
                )
                for rank in range(self.T)
            ]

        sent = blocks(forward_block, Content.SENT)
        return [
            self._cut(self._column_cut_parameter),
            self._id_step(),
            self._local(StepKind.COMPUTE, Phase.FORWARD, sent),
            self._exchange(
                Phase.FORWARD, forward, sent, blocks(forward_block, Content.RECEIVED), len(self.columns[0])
            ),
            self._token_result(),
            self._gradient_in(),
            self._exchange(
                Phase.BACKWARD,
                backward,
                blocks(backward_block, Content.SENT),
                blocks(backward_block, Content.RECEIVED),
                len(self.columns[0]),
            ),
            self._table_gradient(),
        ]

    def _embedding_routed(self) -> list[Step]:
        forward = self._only(Phase.FORWARD, CollectiveKind.ALL_TO_ALL)
        backward = self._only(Phase.BACKWARD, CollectiveKind.ALL_TO_ALL)
        # local rows that each rank sends to each destination, and the ids that they are of
        send_rows = [
            [
                rows.tolist()
                for rows in run.shown["send_rows"].split([len(block) for block in forward[rank].sent])
            ]
            for rank, run in enumerate(self.runs)
        ]
        send_ids = [
            [[self.ids[rank][row] for row in rows] for rows in send_rows[rank]] for rank in range(self.T)
        ]

        def routes(rank: int) -> tuple[Matrix, ...]:
            return tuple(
                self._matrix(
                    Content.ROUTE,
                    [[float(row)] for row in send_rows[rank][to]],
                    Role.KEPT if to == rank else Role.OWN,
                    items=send_ids[rank][to],
                    peer=to,
                )
                for to in range(self.T)
            )

        def rows(content: Content, values: Tensor, ids: list[int], role: Role, peer: int) -> Matrix:
            return self._matrix(content, values, role, items=ids, columns=range(self.toy.hidden), peer=peer)

        def arrival(source: int, rank: int) -> Role:
            return Role.KEPT if source == rank else Role.RECEIVED

        ranks = range(self.T)
        sent = [
            tuple(rows(Content.SENT, forward[r].sent[to], send_ids[r][to], Role.OWN, to) for to in ranks)
            for r in ranks
        ]
        gets = [
            tuple(
                rows(Content.RECEIVED, forward[r].received[s], send_ids[s][r], arrival(s, r), s)
                for s in ranks
            )
            for r in ranks
        ]
        expand = [
            self._matrix(
                Content.EXPAND,
                [[float(row)] for row in self.runs[r].shown["expand"].flatten().tolist()],
                Role.OWN,
                tokens=self.tokens[r],
                items=self._items(self.tokens[r]),
            )
            for r in ranks
        ]
        summed = [
            tuple(rows(Content.SENT, backward[r].sent[s], send_ids[s][r], Role.OWN, s) for s in ranks)
            for r in ranks
        ]
        returned = [
            tuple(
                rows(Content.RECEIVED, backward[r].received[to], send_ids[r][to], arrival(to, r), to)
                for to in ranks
            )
            for r in ranks
        ]
        hidden = self.toy.hidden
        return [
            self._cut(self._row_cut_table),
            self._id_step(),
            self._local(StepKind.ROUTE, Phase.FORWARD, [routes(rank) for rank in ranks]),
            self._exchange(Phase.FORWARD, forward, sent, gets, hidden),
            Step(StepKind.EXPAND, Phase.FORWARD, tuple(Panel(r, gets[r], (expand[r],)) for r in ranks)),
            self._token_result(),
            self._gradient_in(),
            self._local(StepKind.COMPUTE, Phase.BACKWARD, summed),
            self._exchange(Phase.BACKWARD, backward, summed, returned, hidden),
            self._table_gradient(),
        ]

    def _embedding_replicated(self) -> list[Step]:
        self._none(Phase.FORWARD)
        backward = self._only(Phase.BACKWARD, CollectiveKind.ALL_REDUCE)

        def table(content: Content, values: Tensor, role: Role, ids: Sequence[int]) -> tuple[Matrix]:
            roles = [role if item in ids else Role.UNTOUCHED for item in range(VOCABULARY)]
            shaped = values.view(VOCABULARY, -1)
            return (
                self._matrix(content, shaped, roles, items=range(VOCABULARY), columns=range(self.toy.hidden)),
            )

        ranks = range(self.T)
        own_ids = [run.shown["own_ids"].flatten().tolist() for run in self.runs]
        partial = [table(Content.PARTIAL, backward[r].sent[0], Role.PARTIAL, own_ids[r]) for r in ranks]
        all_ids = self._items(self.all_tokens)
        looked_up = [
            self._matrix(
                Content.IDS,
                [[float(item)] for item in own_ids[r]],
                Role.OWN,
                tokens=self.tokens[r],
                items=[int(item) for item in own_ids[r]],
            )
            for r in ranks
        ]
        return [
            self._cut(self._whole_table),
            self._id_step(),
            self._local(StepKind.OWNERS, Phase.FORWARD, [(matrix,) for matrix in looked_up]),
            self._token_result(),
            self._gradient_in(),
            self._local(StepKind.COMPUTE, Phase.BACKWARD, partial),
            self._exchange(
                Phase.BACKWARD,
                backward,
                partial,
                [table(Content.SUM, backward[r].result, Role.SUMMED, all_ids) for r in ranks],
                self.toy.hidden,
            ),
            self._table_gradient(),
        ]

    def _linear_colwise(self) -> list[Step]:
        forward = self._only(Phase.FORWARD, CollectiveKind.ALL_GATHER)
        backward = self._only(Phase.BACKWARD, CollectiveKind.REDUCE_SCATTER)
        sent, gathered = self._gather_blocks(forward, Role.GIVEN)
        partial, summed = self._scatter_blocks(backward)
        output = [
            (self._slices(Content.OUTPUT, self.runs[r].output, self.all_tokens, r, Role.OWN, None),)
            for r in range(self.T)
        ]
        whole = self._of_tokens(
            Content.OUTPUT, self.whole.output, self.all_tokens, Role.OWN, column_owners=self.column_owners
        )
        given = [
            (
                self._slices(
                    Content.OUTPUT_GRADIENT,
                    self.runs[r].output_gradient,
                    self.all_tokens,
                    r,
                    Role.GIVEN,
                    None,
                ),
            )
            for r in range(self.T)
        ]
        return [
            self._cut(self._row_cut_table),
            self._local(StepKind.INPUT, Phase.FORWARD, self._input_rows()),
            self._exchange(Phase.FORWARD, forward, sent, gathered, self.toy.hidden),
            self._compared(
                StepKind.RESULT,
                Phase.FORWARD,
                output,
                whole,
                self._difference("output", self.toy.output_dim - 1),
            ),
            self._local(StepKind.GRADIENT_IN, Phase.BACKWARD, given),
            self._local(StepKind.COMPUTE, Phase.BACKWARD, partial),
            self._exchange(Phase.BACKWARD, backward, partial, summed, self.toy.hidden),
            self._input_gradient(),
            self._weight_gradient(self._row_cut_gradient, 0),
        ]

    def _linear_rowwise(self) -> list[Step]:
        forward = self._only(Phase.FORWARD, CollectiveKind.REDUCE_SCATTER)
        backward = self._only(Phase.BACKWARD, CollectiveKind.ALL_GATHER)
        partial, summed = self._scatter_blocks(forward)
        sent, gathered = self._gather_blocks(backward, Role.GIVEN)
        given = [
            (self._slices(Content.INPUT, self.runs[r].input, self.all_tokens, r, Role.GIVEN, None),)
            for r in range(self.T)
        ]
        input_gradient = [
            (
                self._slices(
                    Content.INPUT_GRADIENT, self.runs[r].input_gradient, self.all_tokens, r, Role.OWN, None
                ),
            )
            for r in range(self.T)
        ]
        whole = self._of_tokens(
            Content.INPUT_GRADIENT,
            self.whole.input_gradient,
            self.all_tokens,
            Role.OWN,
            column_owners=self.column_owners,
        )
        return [
            self._cut(self._column_cut_parameter),
            self._local(StepKind.INPUT, Phase.FORWARD, given),
            self._local(StepKind.COMPUTE, Phase.FORWARD, partial),
            self._exchange(Phase.FORWARD, forward, partial, summed, self.toy.hidden),
            self._token_result(),
            self._gradient_in(),
            self._exchange(Phase.BACKWARD, backward, sent, gathered, self.toy.hidden),
            self._compared(
                StepKind.INPUT_GRADIENT,
                Phase.BACKWARD,
                input_gradient,
                whole,
                self._difference("input_gradient", 1),
            ),
            self._weight_gradient(self._column_cut_gradient, 1),
        ]

    def _norm(self) -> list[Step]:
        self._none(Phase.FORWARD)
        backward = self._only(Phase.BACKWARD, CollectiveKind.ALL_REDUCE)

        def weight(content: Content, values: Tensor, role: Role) -> Matrix:
            return self._matrix(content, values.view(1, -1), role, columns=range(self.toy.hidden))

        ranks = range(self.T)
        partial = [(weight(Content.PARTIAL, backward[r].sent[0], Role.PARTIAL),) for r in ranks]
        summed = [(weight(Content.SUM, backward[r].result, Role.SUMMED),) for r in ranks]
        return [
            self._cut(lambda run, _: weight(Content.PARAMETER, run.parameter, Role.OWN)),
            self._local(StepKind.INPUT, Phase.FORWARD, self._input_rows()),
            self._token_result(),
            self._gradient_in(),
            self._input_gradient(),
            self._local(StepKind.COMPUTE, Phase.BACKWARD, partial),
            self._exchange(Phase.BACKWARD, backward, partial, summed, self.toy.hidden),
            self._weight_gradient(lambda run, _: weight(Content.GRADIENT, run.gradient, Role.SUMMED), None),
        ]

    def _loss(self) -> list[Step]:
        # [2, S] statistics on the wire; a token's two numbers are a row
        forward = [
            replace(
                exchanged,
                sent=tuple(block.view(2, -1).T for block in exchanged.sent),
                received=tuple(block.view(2, -1).T for block in exchanged.received),
            )
            for exchanged in self._only(Phase.FORWARD, CollectiveKind.ALL_GATHER)
        ]
        self._none(Phase.BACKWARD)
        ranks = range(self.T)
        labels = [int(label) for label in self.toy.labels().flatten().tolist()]
        items = [None if label == IGNORED else label for label in labels]

        def own(rank: int) -> list[Role]:
            columns = self.runs[rank].shown["own_columns"].tolist()
            return [
                Role.IGNORED if label == IGNORED else Role.ZERO if column < 0 else Role.OWN
                for label, column in zip(labels, columns, strict=True)
            ]

        def of_tokens(
            content: Content, values: Tensor | list[list[float | None]], roles: Role | list[Role]
        ) -> Matrix:
            return self._matrix(content, values, roles, tokens=self.all_tokens, items=items)

        def logits(content: Content, values: Tensor, columns: Sequence[int]) -> Matrix:
            owners = [self.column_owners[column] for column in columns]
            return self._matrix(
                content,
                values,
                Role.OWN,
                tokens=self.all_tokens,
                items=items,
                columns=columns,
                column_owners=owners,
            )

        mine = [
            of_tokens(
                Content.LOCAL_ROWS,
                [
                    [None if column < 0 else float(column)]
                    for column in self.runs[r].shown["own_columns"].tolist()
                ],
                own(r),
            )
            for r in ranks
        ]
        sent = [(of_tokens(Content.SENT, forward[r].sent[0], Role.OWN),) for r in ranks]
        gathered = [
            tuple(
                self._matrix(
                    Content.RECEIVED,
                    forward[r].received[s],
                    Role.KEPT if s == r else Role.RECEIVED,
                    tokens=self.all_tokens,
                    items=items,
                    peer=s,
                )
                for s in ranks
            )
            for r in ranks
        ]
        result = [
            (
                of_tokens(
                    Content.STATISTICS,
                    torch.stack((self.runs[r].shown["lse"], self.runs[r].shown["losses"]), 1),
                    [Role.IGNORED if item is None else Role.SUMMED for item in items],
                ),
                self._matrix(Content.OUTPUT, self.runs[r].output.view(1, 1), Role.SUMMED),
            )
            for r in ranks
        ]
        return [
            self._cut(lambda run, rank: logits(Content.PARAMETER, run.parameter, self.columns[rank])),
            self._local(StepKind.OWNERS, Phase.FORWARD, [(matrix,) for matrix in mine]),
            self._local(StepKind.COMPUTE, Phase.FORWARD, sent),
            self._exchange(Phase.FORWARD, forward, sent, gathered, 2),
            self._compared(
                StepKind.RESULT,
                Phase.FORWARD,
                result,
                self._matrix(Content.OUTPUT, self.whole.output.view(1, 1), Role.SUMMED),
                self._difference("output", None),
            ),
            self._compared(
                StepKind.GRADIENT,
                Phase.BACKWARD,
                [(logits(Content.GRADIENT, self.runs[r].gradient, self.columns[r]),) for r in ranks],
                logits(Content.GRADIENT, self.whole.gradient, range(VOCABULARY)),
                self._difference("gradient", 1),
            ),
        ]

    def _only(self, phase: Phase, kind: CollectiveKind) -> list[Exchanged]:
        """The one collective that every rank issued in a phase."""
        found = [run.forward if phase is Phase.FORWARD else run.backward for run in self.runs]
        for rank, exchanges in enumerate(found):
            if [exchanged.kind for exchanged in exchanges] != [kind]:
                issued = ", ".join(exchanged.kind for exchanged in exchanges) or "none"
                raise RunError(
                    f"walk-through {self.toy.subject}: rank {rank} issued {issued} in {phase}, where one {kind} was expected."
                )
        return [exchanges[0] for exchanges in found]

    def _none(self, phase: Phase) -> None:
        for rank, run in enumerate(self.runs):
            exchanges = run.forward if phase is Phase.FORWARD else run.backward
            if exchanges:
                raise RunError(
                    f"walk-through {self.toy.subject}: rank {rank} issued {exchanges[0].kind} in {phase}, where none was expected."
                )

    def _items(self, tokens: Sequence[int]) -> list[int]:
        ids = self.runs[0].input.tolist()
        return [int(ids[token]) for token in tokens]

    def _is_row_cut(self) -> bool:
        return self.toy.subject in (
            Subject.EMBEDDING_ROWWISE,
            Subject.EMBEDDING_ROUTED,
            Subject.EMBEDDING_ROUTED_INTERLEAVED,
            Subject.LINEAR_COLWISE,
        )

    def _matrix(
        self,
        content: Content,
        values: Tensor | Sequence[Sequence[float | None]],
        roles: Role | Sequence[Role],
        *,
        tokens: Sequence[int] | None = None,
        items: Sequence[int | None] | None = None,
        columns: Sequence[int] = (),
        peer: int | None = None,
        column_owners: Sequence[int] = (),
    ) -> Matrix:
        listed: Sequence[Sequence[float | None]] = (
            values.detach().tolist() if isinstance(values, Tensor) else values
        )
        with_owners = self._is_row_cut() and self.toy.kind == "embedding"
        return Matrix(
            content,
            tuple(columns),
            tuple(
                Row(
                    tuple(row),
                    roles if isinstance(roles, Role) else roles[index],
                    token=None if tokens is None else tokens[index],
                    item=(item := None if items is None else items[index]),
                    owner=self.owner.get(item) if with_owners and item is not None else None,
                )
                for index, row in enumerate(listed)
            ),
            peer,
            tuple(column_owners),
        )

    def _of_tokens(
        self,
        content: Content,
        values: Tensor,
        tokens: Sequence[int],
        roles: Role | Sequence[Role],
        *,
        peer: int | None = None,
        column_owners: Sequence[int] = (),
    ) -> Matrix:
        """Whole rows of tokens."""
        shaped = values.reshape(len(tokens), self.toy.hidden)
        items = self._items(tokens) if self.toy.kind == "embedding" else None
        columns = range(self.toy.hidden)
        return self._matrix(
            content,
            shaped,
            roles,
            tokens=tokens,
            items=items,
            columns=columns,
            peer=peer,
            column_owners=column_owners,
        )

    def _slices(
        self,
        content: Content,
        values: Tensor,
        tokens: Sequence[int],
        owner: int,
        role: Role,
        peer: int | None,
    ) -> Matrix:
        """The columns of `owner` of tokens' rows."""
        columns = self.columns[owner]
        items = self._items(tokens) if self.toy.kind == "embedding" else None
        shaped = values.reshape(len(tokens), len(columns))
        return self._matrix(
            content,
            shaped,
            role,
            tokens=tokens,
            items=items,
            columns=columns,
            peer=peer,
            column_owners=[owner] * len(columns),
        )

    def _cut(self, matrix: Callable[[Run, int], Matrix]) -> Step:
        return self._local(
            StepKind.CUT, Phase.FORWARD, [(matrix(run, rank),) for rank, run in enumerate(self.runs)]
        )

    def _row_cut(self, content: Content, values: Tensor, rank: int, roles: Role | Sequence[Role]) -> Matrix:
        items = self.ids[rank]
        return self._with_item_owners(
            self._matrix(content, values, roles, items=items, columns=range(self.toy.hidden))
        )

    def _with_item_owners(self, matrix: Matrix) -> Matrix:
        rows = tuple(
            Row(row.values, row.role, row.token, row.item, self.owner[row.item])
            if row.item is not None
            else row
            for row in matrix.rows
        )
        return Matrix(matrix.content, matrix.columns, rows, matrix.peer, matrix.column_owners)

    def _row_cut_table(self, run: Run, rank: int) -> Matrix:
        return self._row_cut(Content.PARAMETER, run.parameter, rank, Role.OWN)

    def _column_cut_parameter(self, run: Run, rank: int) -> Matrix:
        return self._column_cut(Content.PARAMETER, run.parameter, rank, Role.OWN)

    def _column_cut(
        self, content: Content, values: Tensor, rank: int, roles: Role | Sequence[Role]
    ) -> Matrix:
        columns = self.columns[rank]
        return self._matrix(
            content,
            values,
            roles,
            items=range(len(values)),
            columns=columns,
            column_owners=[rank] * len(columns),
        )

    def _whole_table(self, run: Run, rank: int) -> Matrix:
        return self._matrix(
            Content.PARAMETER,
            run.parameter,
            Role.OWN,
            items=range(VOCABULARY),
            columns=range(self.toy.hidden),
        )

    def _row_cut_gradient(self, run: Run, rank: int) -> Matrix:
        return self._row_cut(Content.GRADIENT, run.gradient, rank, Role.OWN)

    def _column_cut_gradient(self, run: Run, rank: int) -> Matrix:
        return self._column_cut(Content.GRADIENT, run.gradient, rank, Role.OWN)

    def _id_step(self) -> Step:
        return self._local(
            StepKind.INPUT,
            Phase.FORWARD,
            [
                (
                    self._matrix(
                        Content.IDS,
                        [[float(item)] for item in run.input.tolist()],
                        Role.GIVEN,
                        tokens=self.all_tokens,
                        items=[int(item) for item in run.input.tolist()],
                    ),
                )
                for run in self.runs
            ],
        )

    def _input_rows(self) -> list[tuple[Matrix, ...]]:
        return [
            (self._of_tokens(Content.INPUT, self.runs[r].input, self.tokens[r], Role.GIVEN),)
            for r in range(self.T)
        ]

    def _gather_blocks(
        self, exchanged: list[Exchanged], role: Role
    ) -> tuple[list[tuple[Matrix, ...]], list[tuple[Matrix, ...]]]:
        """(what each rank lays down, what each has from every rank) of an all-gather of whole rows."""
        ranks = range(self.T)
        sent = [(self._of_tokens(Content.SENT, exchanged[r].sent[0], self.tokens[r], role),) for r in ranks]
        received = [
            tuple(
                self._of_tokens(
                    Content.RECEIVED,
                    exchanged[r].received[s],
                    self.tokens[s],
                    Role.KEPT if s == r else Role.RECEIVED,
                    peer=s,
                )
                for s in ranks
            )
            for r in ranks
        ]
        return sent, received  # type: ignore[return-value]

    def _scatter_blocks(
        self, exchanged: list[Exchanged]
    ) -> tuple[list[tuple[Matrix, ...]], list[tuple[Matrix, ...]]]:
        """(summands by destination, summands by source and their sum) of a reduce-scatter of whole rows."""
        ranks = range(self.T)
        partial = [
            tuple(
                self._of_tokens(Content.SENT, exchanged[r].sent[to], self.tokens[to], Role.PARTIAL, peer=to)
                for to in ranks
            )
            for r in ranks
        ]
        summed = [
            (
                *(
                    self._of_tokens(
                        Content.RECEIVED,
                        exchanged[r].received[s],
                        self.tokens[r],
                        Role.KEPT if s == r else Role.RECEIVED,
                        peer=s,
                    )
                    for s in ranks
                ),
                self._of_tokens(Content.SUM, exchanged[r].result, self.tokens[r], Role.SUMMED),
            )
            for r in ranks
        ]
        return partial, summed

    def _local(self, kind: StepKind, phase: Phase, holds: Sequence[tuple[Matrix, ...]]) -> Step:
        return Step(kind, phase, tuple(Panel(rank, matrices) for rank, matrices in enumerate(holds)))

    def _exchange(
        self,
        phase: Phase,
        exchanged: list[Exchanged],
        holds: Sequence[tuple[Matrix, ...]],
        gets: Sequence[tuple[Matrix, ...]],
        width: int,
    ) -> Step:
        """width: numbers in a row of what travels."""
        first = exchanged[0]
        transfers = tuple(
            _transfer(first.kind, source, destination, exchanged[source].sent[destination], width, self.T)
            for source in range(self.T)
            for destination in range(self.T)
            if source != destination
        )
        panels = tuple(Panel(rank, holds[rank], gets[rank]) for rank in range(self.T))
        return Step(
            StepKind.EXCHANGE,
            phase,
            panels,
            Exchange(first.kind, str(first.origin.before), str(first.origin.after), transfers),
        )

    def _compared(
        self,
        kind: StepKind,
        phase: Phase,
        holds: Sequence[tuple[Matrix, ...]],
        whole: Matrix,
        difference: Difference,
    ) -> Step:
        panels = (*(Panel(rank, matrices) for rank, matrices in enumerate(holds)), Panel(None, (whole,)))
        return Step(kind, phase, panels, difference=difference)

    def _token_result(self) -> Step:
        owners = self.column_owners if self.toy.subject is Subject.EMBEDDING_COLWISE else ()
        holds = [
            (
                self._of_tokens(
                    Content.OUTPUT, self.runs[r].output, self.tokens[r], Role.OWN, column_owners=owners
                ),
            )
            for r in range(self.T)
        ]
        whole = self._of_tokens(
            Content.OUTPUT, self.whole.output, self.all_tokens, Role.OWN, column_owners=owners
        )
        return self._compared(StepKind.RESULT, Phase.FORWARD, holds, whole, self._difference("output", 0))

    def _gradient_in(self) -> Step:
        owners = self.column_owners if self.toy.subject is Subject.EMBEDDING_COLWISE else ()
        return self._local(
            StepKind.GRADIENT_IN,
            Phase.BACKWARD,
            [
                (
                    self._of_tokens(
                        Content.OUTPUT_GRADIENT,
                        self.runs[r].output_gradient,
                        self.tokens[r],
                        Role.GIVEN,
                        column_owners=owners,
                    ),
                )
                for r in range(self.T)
            ],
        )

    def _input_gradient(self) -> Step:
        holds = [
            (self._of_tokens(Content.INPUT_GRADIENT, self.runs[r].input_gradient, self.tokens[r], Role.OWN),)
            for r in range(self.T)
        ]
        whole = self._of_tokens(Content.INPUT_GRADIENT, self.whole.input_gradient, self.all_tokens, Role.OWN)
        return self._compared(
            StepKind.INPUT_GRADIENT, Phase.BACKWARD, holds, whole, self._difference("input_gradient", 0)
        )

    def _table_gradient(self) -> Step:
        touched = set(self._items(self.all_tokens))

        def roles(items: Sequence[int]) -> list[Role]:
            return [Role.OWN if item in touched else Role.UNTOUCHED for item in items]

        match self.toy.subject:
            case Subject.EMBEDDING_COLWISE:
                dim: int | None = 1
                holds = [
                    (self._column_cut(Content.GRADIENT, self.runs[r].gradient, r, roles(range(VOCABULARY))),)
                    for r in range(self.T)
                ]
            case Subject.EMBEDDING_REPLICATED:
                dim = None
                holds = [
                    (self._whole_gradient(self.runs[r], roles(range(VOCABULARY))),) for r in range(self.T)
                ]
            case _:
                dim = 0
                holds = [
                    (self._row_cut(Content.GRADIENT, self.runs[r].gradient, r, roles(self.ids[r])),)
                    for r in range(self.T)
                ]
        return self._compared(
            StepKind.GRADIENT,
            Phase.BACKWARD,
            holds,
            self._whole_gradient(self.whole, roles(range(VOCABULARY))),
            self._difference("gradient", dim),
        )

    def _whole_gradient(self, run: Run, roles: Sequence[Role]) -> Matrix:
        owners = self.column_owners if self.toy.subject is Subject.EMBEDDING_COLWISE else ()
        return self._matrix(
            Content.GRADIENT,
            run.gradient,
            roles,
            items=range(len(run.gradient)),
            columns=range(self.toy.hidden),
            column_owners=owners,
        )

    def _weight_gradient(self, matrix: Callable[[Run, int], Matrix], dim: int | None) -> Step:
        holds = [(matrix(run, rank),) for rank, run in enumerate(self.runs)]
        if self.whole.gradient.dim() == 1:
            whole = matrix(self.whole, 0)
        else:
            owners = self.column_owners if dim == 1 else ()
            whole = self._matrix(
                Content.GRADIENT,
                self.whole.gradient,
                Role.OWN,
                items=range(len(self.whole.gradient)),
                columns=range(self.toy.hidden),
                column_owners=owners,
            )
            whole = self._with_item_owners(whole) if dim == 0 else whole
        return self._compared(
            StepKind.GRADIENT, Phase.BACKWARD, holds, whole, self._difference("gradient", dim)
        )

    def _difference(self, name: str, dim: int | None) -> Difference:
        """Of a tensor that the ranks have cut along `dim` (as the table's rows are dealt, for rows), or each whole."""
        expected: Tensor = getattr(self.whole, name)
        largest = 0.0
        for rank, run in enumerate(self.runs):
            part = expected
            if dim == 0 and name == "gradient":
                part = expected[self.ids[rank]]
            elif dim is not None:
                sizes = chunk_sizes(expected.shape[dim], self.T)
                part = expected.narrow(dim, sum(sizes[:rank]), sizes[rank])
            actual: Tensor = getattr(run, name)
            if actual.shape != part.shape:
                return Difference(float("inf"), 0.0)
            largest = max(largest, float((actual - part).abs().max()))
        return Difference(largest, ALLOWED_ERROR * max(1.0, float(expected.abs().max())))


def _transfer(
    kind: CollectiveKind, source: int, destination: int, block: Tensor, width: int, ranks: int
) -> Transfer:
    if kind is CollectiveKind.ALL_REDUCE:
        share = wire_bytes(kind, _bytes(block), ranks) / (ranks - 1)
        return Transfer(source, destination, None, None, round(share))
    rows = block.reshape(-1, width)
    return Transfer(source, destination, len(rows), int((rows == 0).all(1).sum()), _bytes(block))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
