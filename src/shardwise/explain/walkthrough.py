"""Walkthrough -> the same with words, for someone who has never heard of tensor parallelism: Explained. Imports no torch.

Every number in a sentence is read from the record; what is said about a style is true of the style, whatever the numbers are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count

from shardwise.core.collective import CollectiveKind
from shardwise.core.walkthrough import (
    Content,
    Difference,
    Exchange,
    Matrix,
    Panel,
    Phase,
    Role,
    Row,
    Step,
    StepKind,
    Subject,
    Transfer,
    Walkthrough,
)

COLLECTIVES = {
    CollectiveKind.ALL_REDUCE: "all-reduce",
    CollectiveKind.ALL_GATHER: "all-gather",
    CollectiveKind.REDUCE_SCATTER: "reduce-scatter",
    CollectiveKind.ALL_TO_ALL: "all-to-all",
    CollectiveKind.BROADCAST: "broadcast",
}


@dataclass(frozen=True, slots=True)
class ExplainedMatrix:
    """A matrix with a caption and a label for each row and column ("" where a column needs none)."""

    caption: str
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    matrix: Matrix


@dataclass(frozen=True, slots=True)
class ExplainedPanel:
    """rank None: the unsharded module."""

    rank: int | None
    title: str
    holds: tuple[ExplainedMatrix, ...]
    gets: tuple[ExplainedMatrix, ...]


@dataclass(frozen=True, slots=True)
class ExplainedTransfer:
    transfer: Transfer
    text: str


@dataclass(frozen=True, slots=True)
class ExplainedStep:
    """wire: what the collective is called and does. agreement: what the comparison with the unsharded module said."""

    title: str
    words: tuple[str, ...]
    phase: Phase
    kind: StepKind
    panels: tuple[ExplainedPanel, ...]
    wire: str
    transfers: tuple[ExplainedTransfer, ...]
    agreement: str
    agrees: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """The last step: a table with a line per rank, and what to remember."""

    title: str
    words: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Explained:
    """group and name: where it stands among others, such as "Embedding" and "rowwise"."""

    subject: Subject
    group: str
    name: str
    title: str
    lead: str
    ranks: int
    steps: tuple[ExplainedStep, ...]
    summary: Summary
    agrees: bool


def explain_walkthrough(walkthrough: Walkthrough) -> Explained:
    """Words for every step, in the order of the steps, and a summary."""
    reader = _Reader(walkthrough)
    texts = _TEXTS[walkthrough.subject](reader)
    group, _, name = walkthrough.subject.partition("/")
    return Explained(
        subject=walkthrough.subject,
        group=group.capitalize(),
        name=name.replace("_", " "),
        title=_TITLES[walkthrough.subject],
        lead=(
            f"{walkthrough.module}: a toy of it on {reader.T} ranks. Every number below was recorded while the style really ran; none is typed in."
        ),
        ranks=reader.T,
        steps=tuple(_explained_step(reader, step, *texts[step.phase, step.kind]) for step in walkthrough.steps),
        summary=_summary(reader),
        agrees=walkthrough.agrees,
    )


Text = tuple[str, tuple[str, ...]]
Texts = dict[tuple[Phase, StepKind], Text]
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD

_TITLES = {
    Subject.EMBEDDING_ROWWISE: "Embedding, rowwise: every rank keeps some of the rows",
    Subject.EMBEDDING_COLWISE: "Embedding, colwise: every rank keeps a slice of every row",
    Subject.EMBEDDING_ROUTED: "Embedding, routed: whoever owns a row sends it to whoever needs it",
    Subject.EMBEDDING_ROUTED_INTERLEAVED: "Embedding, routed, rows dealt in turn so that no rank is hot",
    Subject.EMBEDDING_REPLICATED: "Embedding, replicated: every rank keeps the whole table",
    Subject.LINEAR_COLWISE: "Linear, colwise: every rank computes some of the outputs",
    Subject.LINEAR_ROWWISE: "Linear, rowwise: every rank computes a part of every sum",
    Subject.NORM_SEQUENCE_PARALLEL: "Norm, sequence parallel: every rank norms its own tokens",
    Subject.LOSS_VOCAB_PARALLEL: "Loss, vocabulary parallel: the logits are never gathered",
}


class _Reader:
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
        return [row.item for row in self.matrix(StepKind.INPUT, FORWARD, 0, Content.IDS).rows if row.item is not None]

    def kept_items(self, rank: int) -> list[int]:
        return [row.item for row in self.matrix(StepKind.CUT, FORWARD, rank, Content.PARAMETER).rows if row.item is not None]

    def kept_columns(self, rank: int) -> tuple[int, ...]:
        return self.matrix(StepKind.CUT, FORWARD, rank, Content.PARAMETER).columns

    def result_tokens(self, rank: int) -> list[int]:
        return [row.token for row in self.matrix(StepKind.RESULT, FORWARD, rank, Content.OUTPUT).rows if row.token is not None]

    def each(self, text: Callable[[int], str]) -> str:
        """`rank 0 TEXT, rank 1 TEXT and rank 2 TEXT`."""
        return _listing(f"rank {rank} {text(rank)}" for rank in self.ranks)

    def spans(self, verb: str, numbers_of: Callable[[int], Iterable[int]], what: str) -> str:
        """`rank 0 keeps ids 0 to 3 and rank 1 keeps ids 4 to 7`."""
        return self.each(lambda rank: f"{verb} {_span(numbers_of(rank), what)}")

    def owned(self) -> str:
        """`rank 0 owns the row of 3 tokens and rank 1 ...`."""
        return self.each(lambda rank: f"owns the row of {_count(self.own_tokens(rank), 'token')}")

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
        rows = (row for rank in self.ranks for row in self.matrix(StepKind.GRADIENT, BACKWARD, rank, Content.GRADIENT).rows)
        total = next(row.values[0] for row in rows if row.item == item)
        terms = " + ".join(_number(given[token]) for token in tokens)
        return (
            f"Id {item} stands at {_numbered('token', tokens)}, so its row gets the sum of their gradients: {terms} = {_number(total)} "
            "in the first column."
        )

    def exchange(self, phase: Phase) -> Exchange:
        exchange = self.walkthrough.step(StepKind.EXCHANGE, phase).exchange
        assert exchange is not None
        return exchange

    def wire_rows(self, phase: Phase) -> str:
        rows, zeros = self.walkthrough.sent_rows(phase)
        text = f"{_count(rows, 'row')} cross{'es' if rows == 1 else ''} the wire, {self.total_bytes(phase)} bytes in all"
        return f"{text}, and {zeros} of them {'is' if zeros == 1 else 'are'} nothing but zeros" if zeros else text

    def total_bytes(self, phase: Phase) -> int:
        return sum(self.walkthrough.sent_bytes(rank, phase) for rank in self.ranks)


def _embedding_start(reader: _Reader) -> Text:
    ids = reader.ids()
    return (
        "Every rank sees all the ids",
        (
            f"The text has {len(ids)} tokens, with the ids {_commas(ids)}. Every rank is given all of them.",
            f"In the end {reader.spans('must have the rows of', reader.result_tokens, 'token')}: its own part of the sequence.",
        ),
    )


def _rowwise(reader: _Reader) -> Texts:
    kept, whole = reader.kept_bytes()
    stranger = reader.stranger()
    need = ""
    if stranger is not None:
        rank, row = stranger
        need = f" Rank {rank} has the gradient of token {row.token}, but the row of its id {row.item} lives on rank {row.owner}."
    return {
        (FORWARD, StepKind.CUT): (
            "The table is cut by rows",
            (
                f"The table has {reader.sizes.vocabulary} rows, one for each token id. {_upper(reader.spans('keeps the rows of', reader.kept_items, 'id'))}.",
                f"So a rank keeps at most {kept} bytes of the table's {whole}. You can read the id off a row: the row of id 5 is 50, 51, 52, and so on.",
            ),
        ),
        (FORWARD, StepKind.INPUT): _embedding_start(reader),
        (FORWARD, StepKind.OWNERS): (
            "Each rank asks of every token: is this row mine?",
            (
                "If it is, the rank notes where the row lies in its own part of the table. If not, it notes that it has none. This is the mask.",
                f"Here {reader.owned()}. Every token has exactly one owner.",
            ),
        ),
        (FORWARD, StepKind.COMPUTE): (
            "Look up your own rows, and put zeros for all others",
            (
                "Each rank makes a row for every token: the real one where it owns the id, a row of zeros where it doesn't.",
                "For each token exactly one rank has put something. So if all ranks' rows are added up, the sum is the whole embedding.",
            ),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Add up over the ranks, and keep your part of the sequence",
            (
                "Each rank sends to every other rank the rows of that rank's tokens, and adds what it gets to what it has. "
                "Something plus zeros is something: nothing is lost, nothing is counted twice.",
                f"{_upper(reader.wire_rows(FORWARD))}. On T ranks (T-1)/T of them are, on average: that is the price of rowwise.",
            ),
        ),
        (FORWARD, StepKind.RESULT): _token_result(reader),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the output comes in",
            (f"Each rank is given the gradient of its own tokens only.{need}",),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Everyone gets everyone's gradients",
            (
                "Forward was a sum and a cut, so backward is a copy to all: an all-gather. Afterwards every rank has the gradient of every token, "
                "also of those whose rows it doesn't own.",
                f"{_upper(reader.wire_rows(BACKWARD))}.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): _row_gradient(reader),
    }


def _colwise(reader: _Reader) -> Texts:
    kept, whole = reader.kept_bytes()
    return {
        (FORWARD, StepKind.CUT): (
            "The table is cut by columns",
            (
                f"Every rank keeps all {reader.sizes.vocabulary} rows, but only a slice of each: "
                f"{reader.spans('keeps', reader.kept_columns, 'column')}.",
                f"So a rank keeps {kept} bytes of the table's {whole}. The row of id 5 is 50, 51, 52, and so on; each rank has a piece of it.",
            ),
        ),
        (FORWARD, StepKind.INPUT): _embedding_start(reader),
        (FORWARD, StepKind.COMPUTE): (
            "Look up your slice of every token",
            (
                "Every rank knows every token: there is no mask, and there are no zeros. But nobody has a whole row.",
                "The slices lie in the order of their destination: a block for each rank. The block for oneself stays where it is.",
            ),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Swap: my slice of your tokens for your slice of mine",
            (
                "Each rank sends to every other rank its slice of that rank's tokens. Put side by side, the slices are whole rows. Nothing is added up.",
                f"{_upper(reader.wire_rows(FORWARD))}; a row here is only {_count(len(reader.kept_columns(0)), 'number')} long.",
            ),
        ),
        (FORWARD, StepKind.RESULT): _token_result(reader),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the output comes in",
            (
                "Each rank is given the gradient of its own tokens: whole rows. But the owner of a column needs that column's gradient of all tokens.",
            ),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Swap back",
            (
                "The same swap the other way: each rank cuts its rows into slices and sends to every rank the columns which that rank owns.",
                f"{_upper(reader.wire_rows(BACKWARD))}.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "Add up, for every id, the slices of its tokens",
            (
                f"{reader.sum_of_repeated()} Ids that didn't occur get zeros.",
                "A rank's gradient has the shape of its part of the table. No further exchange is needed.",
            ),
        ),
    }


def _routed(reader: _Reader) -> Texts:
    kept, whole = reader.kept_bytes()
    interleaved = reader.walkthrough.subject is Subject.EMBEDDING_ROUTED_INTERLEAVED
    ids = reader.ids()
    tokens = len(ids)
    sends = [reader.walkthrough.sent_bytes(rank, FORWARD) for rank in reader.ranks]
    deal = (
        "Rows are dealt in turn, like cards. Frequent words have small ids, so each rank gets some of the frequent rows, and no rank has to send most."
        if interleaved
        else f"So a rank keeps at most {kept} bytes of the table's {whole}, as in rowwise."
    )
    own_twice = reader.repeated()
    distinct = ""
    if own_twice is not None:
        distinct = f" A row that a rank needs for several tokens is sent once, not once for each (id {own_twice[0]} occurs {len(own_twice[1])} times in the text)."
    return {
        (FORWARD, StepKind.CUT): (
            "The table is cut by rows",
            (f"{_upper(reader.spans('keeps the rows of', reader.kept_items, 'id'))}.", deal),
        ),
        (FORWARD, StepKind.INPUT): (
            _embedding_start(reader)[0],
            (
                *_embedding_start(reader)[1],
                "Since all ranks see the same ids, every rank can work out by itself who owns which row and who needs it. Nobody has to ask.",
            ),
        ),
        (FORWARD, StepKind.ROUTE): (
            "Each owner lists the rows that each rank needs",
            (
                f"One list for each destination, and each different id only once.{distinct}",
                f"In all {_count(sum(len(matrix.rows) for r in reader.ranks for matrix in reader.panel(StepKind.ROUTE, FORWARD, r).holds), 'row')} "
                f"are listed for {tokens} tokens. No mask, no rows of zeros.",
            ),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Send exactly those rows",
            (
                f"{_upper(reader.wire_rows(FORWARD))}. Rows that their owner needs itself stay.",
                f"How much a rank sends depends on the text: {reader.each(lambda r: f'sends {sends[r]} bytes')}. All wait for the one that sends most.",
            ),
        ),
        (FORWARD, StepKind.EXPAND): (
            "Put the rows where the tokens are",
            (
                "What has arrived is numbered 0, 1, 2, and so on. Each token of the own part takes the arrival with its id; a row may be taken several times.",
            ),
        ),
        (FORWARD, StepKind.RESULT): _token_result(reader),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the output comes in",
            ("Each rank is given the gradient of its own tokens.",),
        ),
        (BACKWARD, StepKind.COMPUTE): (
            "First add up at home",
            (
                "Tokens with the same id have used one row, so their gradients are added up before anything is sent. What goes back is one row for each row that came.",
            ),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Send the sums back to the owners",
            (f"The same way in the other direction: each rank sends what it received. {_upper(reader.wire_rows(BACKWARD))}.",),
        ),
        (BACKWARD, StepKind.GRADIENT): _row_gradient(reader),
    }


def _replicated(reader: _Reader) -> Texts:
    _, whole = reader.kept_bytes()
    return {
        (FORWARD, StepKind.CUT): (
            "The table is not cut",
            (f"Every rank keeps all {reader.sizes.vocabulary} rows: {whole} bytes on each of {reader.T} ranks.",),
        ),
        (FORWARD, StepKind.INPUT): _embedding_start(reader),
        (FORWARD, StepKind.OWNERS): (
            "Each rank takes its own part of the sequence",
            ("It has every row, so it needs only the ids of its own tokens.",),
        ),
        (FORWARD, StepKind.RESULT): (
            "Look up: done, and nothing was sent",
            ("Each rank has the rows of its own tokens. They are the rows that the unsharded module gives.",),
        ),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the output comes in",
            ("Each rank is given the gradient of its own tokens only.",),
        ),
        (BACKWARD, StepKind.COMPUTE): (
            "Each rank has a part of the table's gradient",
            (
                "Every rank adds its tokens' gradients into a table of the full size. Rows of ids that only other ranks saw are zeros here, though their true gradient isn't.",
            ),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Add up the whole tables, everywhere",
            (
                f"An all-reduce: every rank ends with the sum. {reader.total_bytes(BACKWARD)} bytes cross the wire in all, and that grows with the vocabulary, not with the text.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "Every rank holds the whole gradient",
            (f"{reader.sum_of_repeated()} Each rank keeps all of it: {whole} bytes.",),
        ),
    }


def _linear_colwise(reader: _Reader) -> Texts:
    kept, whole = reader.kept_bytes()
    return {
        (FORWARD, StepKind.CUT): (
            "The weight is cut by outputs",
            (
                f"Each row of the weight makes one output. {_upper(reader.spans('keeps the rows of', reader.kept_items, 'output'))}: {kept} of {whole} bytes.",
                "(It is called colwise because the field writes y = x A, where these rows are the columns of A.)",
            ),
        ),
        (FORWARD, StepKind.INPUT): (
            "Each rank has its own part of the sequence",
            ("But an output needs whole tokens, and every rank has to make its outputs for all tokens.",),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Everyone gets all the tokens",
            (f"An all-gather along the sequence: each rank sends its tokens to all others. {_upper(reader.wire_rows(FORWARD))}.",),
        ),
        (FORWARD, StepKind.RESULT): (
            "Each rank computes its own outputs, whole",
            (
                "An output is one row of the weight times the token: nothing has to be added over the ranks. The outputs stay cut, as the next layer wants them.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the own outputs comes in",
            ("For all tokens, but only for the outputs that this rank made.",),
        ),
        (BACKWARD, StepKind.COMPUTE): (
            "Each rank has a part of the input's gradient",
            ("A token went into the outputs of all ranks. Each rank knows what comes back from its own outputs: one summand.",),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Add up the parts, and keep your tokens",
            (f"A reduce-scatter: forward copied to all, so backward sums from all. {_upper(reader.wire_rows(BACKWARD))}.",),
        ),
        (BACKWARD, StepKind.INPUT_GRADIENT): (
            "The gradient of the input, for the own tokens",
            ("It is the sum over the ranks, and it is what the unsharded module gives.",),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "The gradient of the weight is local already",
            ("Each rank saw all tokens and the gradient of its own outputs: all that its rows need. Nothing more is sent.",),
        ),
    }


def _linear_rowwise(reader: _Reader) -> Texts:
    kept, whole = reader.kept_bytes()
    return {
        (FORWARD, StepKind.CUT): (
            "The weight is cut by inputs",
            (
                f"Every rank keeps a piece of every row: {reader.spans('keeps', reader.kept_columns, 'column')}: {kept} of {whole} bytes.",
                "(It is called rowwise because the field writes y = x A, where these columns are rows of A.)",
            ),
        ),
        (FORWARD, StepKind.INPUT): (
            "Each rank has some features of every token",
            ("That is what a colwise layer before it leaves: the two fit without any exchange between them.",),
        ),
        (FORWARD, StepKind.COMPUTE): (
            "Each rank computes a part of every sum",
            ("An output is a sum over all features, and a rank has only some of them. So what it has is one summand of every output.",),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Add up over the ranks, and keep your part of the sequence",
            (
                "A reduce-scatter: each rank sends the others the parts of their tokens, and adds what it gets to what it has.",
                f"{_upper(reader.wire_rows(FORWARD))}.",
            ),
        ),
        (FORWARD, StepKind.RESULT): (
            "Whole outputs for the own tokens",
            ("The sum of the parts is the whole product: the same as without sharding.",),
        ),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the output comes in",
            ("Each rank is given the gradient of its own tokens only, but its piece of the weight worked on all tokens.",),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Everyone gets everyone's gradients",
            (f"An all-gather along the sequence: forward summed, so backward copies. {_upper(reader.wire_rows(BACKWARD))}.",),
        ),
        (BACKWARD, StepKind.INPUT_GRADIENT): (
            "The gradient of the own features",
            ("Each rank's columns give the gradient of just the features that it had. It stays cut, as the layer before wants it.",),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "The gradient of the weight is local",
            ("Each rank has its features and the gradient of all tokens: all that its columns need. Nothing more is sent.",),
        ),
    }


def _norm(reader: _Reader) -> Texts:
    return {
        (FORWARD, StepKind.CUT): (
            "Every rank keeps the whole weight",
            (f"It is small: {_count(reader.sizes.hidden, 'number')}. What is cut is the sequence.",),
        ),
        (FORWARD, StepKind.INPUT): (
            "Each rank has its own part of the sequence",
            ("A norm looks at one token at a time, so it never needs another rank's tokens.",),
        ),
        (FORWARD, StepKind.RESULT): (
            "Norm your own tokens: nothing is sent",
            ("Each rank does 1/T of the work and keeps 1/T of the activations. The result is what the unsharded module gives.",),
        ),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the own tokens comes in",
            ("Again each rank has its own tokens only.",),
        ),
        (BACKWARD, StepKind.INPUT_GRADIENT): (
            "The gradient of the input needs nobody else",
            ("One token at a time, as forward.",),
        ),
        (BACKWARD, StepKind.COMPUTE): (
            "But the weight served all tokens",
            (
                "Each rank has added up its own tokens' share of the weight's gradient: one summand. Taken alone it is wrong, and training would go wrong silently.",
            ),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Add up the parts, everywhere",
            (
                f"One all-reduce at the end of backward (of all such weights together). {reader.total_bytes(BACKWARD)} bytes cross the wire in all.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "Every rank holds the same, whole gradient",
            ("So every rank makes the same step, and the weights stay equal.",),
        ),
    }


def _loss(reader: _Reader) -> Texts:
    rows, _ = reader.walkthrough.sent_rows(FORWARD)
    numbers = len(reader.walkthrough.step(StepKind.EXCHANGE, FORWARD).of_rank(0).holds[0].rows[0].values)
    loss = reader.matrix(StepKind.RESULT, FORWARD, 0, Content.OUTPUT).rows[0].values[0]
    owners = reader.matrix(StepKind.OWNERS, FORWARD, 0, Content.LOCAL_ROWS).rows
    ignored = [row.token for row in owners if row.role is Role.IGNORED and row.token is not None]
    left_out = f" {_upper(_numbered('token', ignored))} has no label and doesn't count." if ignored else ""
    return {
        (FORWARD, StepKind.CUT): (
            "The logits are cut by vocabulary",
            (
                f"The head before was colwise, so each rank has the scores of all tokens, but only for some ids: "
                f"{reader.spans('has', reader.kept_columns, 'id')}.",
                "With a real vocabulary this is the largest tensor of the model. It is never gathered.",
            ),
        ),
        (FORWARD, StepKind.OWNERS): (
            "Who has the score of the right answer?",
            (f"Each rank looks which labels are among its own ids, and in which of its columns.{left_out}",),
        ),
        (FORWARD, StepKind.COMPUTE): (
            "Two numbers per token say it all",
            (
                "The loss of a token is log(sum of exp(all its logits)) minus the logit of its label. Each rank works out the first for its own ids, "
                "and gives the second if it has the label, else 0.",
            ),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Exchange just these",
            (
                f"{_upper(_count(numbers, 'number'))} per token from each rank to each other: {rows} rows, {reader.total_bytes(FORWARD)} bytes in all. "
                "The vocabulary doesn't matter.",
            ),
        ),
        (FORWARD, StepKind.RESULT): (
            "Every rank has the loss",
            (
                "The ranks' log-sums make one log-sum, and the label's logit comes from its owner: the others gave 0. "
                f"Every rank finds the same mean loss, {_number(loss)}.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "Backward sends nothing",
            (
                "The gradient of a logit is its probability, less 1 if it is the label's, over the number of labels that count. "
                "Each rank has all it needs for its own ids.",
            ),
        ),
    }


_TEXTS: dict[Subject, Callable[[_Reader], Texts]] = {
    Subject.EMBEDDING_ROWWISE: _rowwise,
    Subject.EMBEDDING_COLWISE: _colwise,
    Subject.EMBEDDING_ROUTED: _routed,
    Subject.EMBEDDING_ROUTED_INTERLEAVED: _routed,
    Subject.EMBEDDING_REPLICATED: _replicated,
    Subject.LINEAR_COLWISE: _linear_colwise,
    Subject.LINEAR_ROWWISE: _linear_rowwise,
    Subject.NORM_SEQUENCE_PARALLEL: _norm,
    Subject.LOSS_VOCAB_PARALLEL: _loss,
}


def _token_result(reader: _Reader) -> Text:
    return (
        "Whole rows for the own tokens",
        (f"{_upper(reader.spans('has', reader.result_tokens, 'token'))}. The unsharded module gives the same rows for the same ids.",),
    )


def _row_gradient(reader: _Reader) -> Text:
    return (
        "Add up the gradients of the rows you own",
        (
            f"{reader.sum_of_repeated()} Ids that didn't occur get zeros.",
            "A rank's gradient has the shape of its part of the table: it needs no further exchange, and the optimizer can go on.",
        ),
    )


def _explained_step(reader: _Reader, step: Step, title: str, words: tuple[str, ...]) -> ExplainedStep:
    exchange = step.exchange
    return ExplainedStep(
        title=title,
        words=words,
        phase=step.phase,
        kind=step.kind,
        panels=tuple(_explained_panel(reader, step, panel) for panel in step.panels),
        wire="" if exchange is None else _wire(exchange, step.phase),
        transfers=()
        if exchange is None
        else tuple(ExplainedTransfer(transfer, _transfer_text(transfer)) for transfer in exchange.transfers),
        agreement="" if step.difference is None else _agreement(step.difference),
        agrees=step.difference is None or step.difference.agrees,
    )


def _wire(exchange: Exchange, phase: Phase) -> str:
    name = COLLECTIVES[exchange.collective]
    # a backward's collective carries the placements of the forward that it undoes
    return f"{name}, {exchange.before} → {exchange.after}" if phase is FORWARD else name


def _agreement(difference: Difference) -> str:
    if difference.largest == 0:
        return "Equal to the unsharded module, bit for bit."
    if difference.agrees:
        return f"Equal to the unsharded module up to rounding: the largest difference is {difference.largest:.1e}."
    return f"NOT equal to the unsharded module: the largest difference is {difference.largest:.3g}."


def _transfer_text(transfer: Transfer) -> str:
    if transfer.rows is None:
        return f"{transfer.bytes} B (a ring's share)"
    if not transfer.rows:
        return "nothing"
    zeros = f", {transfer.zero_rows} of zeros" if transfer.zero_rows else ""
    return f"{_count(transfer.rows, 'row')}{zeros} · {transfer.bytes} B"


def _explained_panel(reader: _Reader, step: Step, panel: Panel) -> ExplainedPanel:
    title = "Unsharded" if panel.rank is None else f"Rank {panel.rank}"
    holds = tuple(_explained_matrix(reader, step, panel, matrix) for matrix in panel.holds)
    return ExplainedPanel(
        panel.rank,
        title,
        _numbered_arrivals(holds) if step.kind is StepKind.EXPAND else holds,
        tuple(_explained_matrix(reader, step, panel, matrix) for matrix in panel.gets),
    )


def _explained_matrix(reader: _Reader, step: Step, panel: Panel, matrix: Matrix) -> ExplainedMatrix:
    return ExplainedMatrix(
        _caption(reader, step, panel, matrix),
        tuple(_row_label(reader, matrix, row) for row in matrix.rows),
        _column_labels(reader, step, matrix),
        matrix,
    )


def _numbered_arrivals(matrices: tuple[ExplainedMatrix, ...]) -> tuple[ExplainedMatrix, ...]:
    """Rows labelled by the order in which they lie in memory, over all matrices."""
    arrivals = count()
    return tuple(
        replace(matrix, row_labels=tuple(f"arrival {next(arrivals)} · {label}" for label in matrix.row_labels)) for matrix in matrices
    )


def _caption(reader: _Reader, step: Step, panel: Panel, matrix: Matrix) -> str:
    kind = reader.walkthrough.subject.partition("/")[0]
    is_self = matrix.peer is not None and matrix.peer == panel.rank
    match matrix.content:
        case Content.PARAMETER:
            return {"embedding": "its part of the table", "linear": "its part of the weight", "norm": "the weight"}.get(kind, "its logits")
        case Content.INPUT:
            return "input"
        case Content.IDS:
            return "the ids it looks up" if step.kind is StepKind.OWNERS else "the ids"
        case Content.LOCAL_ROWS:
            return "is the label mine?" if kind == "loss" else "is the row mine?"
        case Content.ROUTE:
            return "needed here, stays" if is_self else f"rank {matrix.peer} needs"
        case Content.EXPAND:
            return "who takes which"
        case Content.SENT:
            if matrix.peer is None:
                return "for every rank"
            return "for itself, stays" if is_self else f"for rank {matrix.peer}"
        case Content.RECEIVED:
            is_summed = any(other.content is Content.SUM for other in panel.gets)
            plus = "+ " if is_summed and matrix is not panel.gets[0] else ""
            return plus + ("its own, stayed" if is_self else f"from rank {matrix.peer}")
        case Content.PARTIAL:
            return "its part of the gradient"
        case Content.SUM:
            return "= the sum" if len(panel.gets) > 1 else "the sum"
        case Content.OUTPUT:
            return "the loss" if kind == "loss" else "output"
        case Content.STATISTICS:
            return "per token"
        case Content.OUTPUT_GRADIENT:
            return "gradient of the output"
        case Content.INPUT_GRADIENT:
            return "gradient of the input"
        case Content.GRADIENT:
            name = {"embedding": "table", "linear": "weight", "norm": "weight"}.get(kind, "logits")
            return f"gradient of the {name}"


def _row_label(reader: _Reader, matrix: Matrix, row: Row) -> str:
    kind = reader.walkthrough.subject.partition("/")[0]
    item = {"embedding": "id", "linear": "output"}.get(kind, "label")
    if row.token is None:
        return "" if row.item is None else f"{item} {row.item}"
    if kind == "loss" and row.item is None:
        return f"token {row.token} · no label"
    if row.item is None or matrix.content is Content.IDS:
        return f"token {row.token}"
    return f"token {row.token} · {item} {row.item}"


def _column_labels(reader: _Reader, step: Step, matrix: Matrix) -> tuple[str, ...]:
    kind = reader.walkthrough.subject.partition("/")[0]
    if matrix.columns:
        return tuple(f"id {column}" if kind == "loss" else str(column) for column in matrix.columns)
    match matrix.content:
        case Content.IDS:
            return ("id",)
        case Content.LOCAL_ROWS:
            return ("its column here",) if kind == "loss" else ("its row here",)
        case Content.ROUTE:
            return ("row here",)
        case Content.EXPAND:
            return ("takes arrival",)
        case Content.SENT | Content.RECEIVED:
            return ("log-sum", "label's logit")
        case Content.STATISTICS:
            return ("log-sum", "loss")
        case _:
            return ()


def _summary(reader: _Reader) -> Summary:
    walkthrough = reader.walkthrough
    is_loss = walkthrough.subject is Subject.LOSS_VOCAB_PARALLEL
    rows: list[tuple[str, ...]] = [
        (
            f"rank {held.rank}",
            f"{_shape(held.parameter_shape)} ({held.parameter_bytes} B)",
            f"{walkthrough.sent_bytes(held.rank, FORWARD)} B",
            f"{walkthrough.sent_bytes(held.rank, BACKWARD)} B",
            f"{_shape(held.gradient_shape)} ({held.gradient_bytes} B)",
        )
        for held in walkthrough.held
    ]
    formulas = formula_bytes(walkthrough)
    rows.append(("formula", _KEPT[walkthrough.subject], *(_formula_text(formula) for formula in formulas), "as kept"))
    equal = (
        "Output and every gradient are equal to the unsharded module's."
        if walkthrough.agrees
        else "The output or a gradient is NOT equal to the unsharded module's."
    )
    return Summary(
        title="What each rank kept and sent",
        words=(_REMEMBER[walkthrough.subject], equal),
        columns=("", "logits" if is_loss else "keeps", "sends forward", "sends backward", "gradient"),
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class Formula:
    """Bytes that one rank sends in a phase. bound: the data decides, and this is the most (averaged over the ranks)."""

    text: str
    bytes: float
    is_bound: bool = False


def formula_bytes(walkthrough: Walkthrough) -> tuple[Formula, Formula]:
    """(forward, backward) by the formulas of docs/embedding.md and core/collective.py, b s tokens, x bytes an element."""
    sizes = walkthrough.sizes
    T, x = sizes.ranks, sizes.element_bytes
    tokens = sizes.batch * sizes.sequence
    share = (T - 1) / T
    nothing = Formula("0", 0.0)
    whole_rows = Formula("b s H x (T-1)/T", tokens * sizes.hidden * x * share)
    match walkthrough.subject:
        case Subject.EMBEDDING_ROWWISE | Subject.LINEAR_COLWISE | Subject.LINEAR_ROWWISE:
            return whole_rows, whole_rows
        case Subject.EMBEDDING_COLWISE:
            slices = Formula("b s H/T x (T-1)/T", whole_rows.bytes / T)
            return slices, slices
        case Subject.EMBEDDING_ROUTED | Subject.EMBEDDING_ROUTED_INTERLEAVED:
            bound = Formula(whole_rows.text, whole_rows.bytes, is_bound=True)
            return bound, bound
        case Subject.EMBEDDING_REPLICATED:
            vocabulary = sizes.vocabulary or 0
            return nothing, Formula("2 (T-1)/T V H x", 2 * share * vocabulary * sizes.hidden * x)
        case Subject.NORM_SEQUENCE_PARALLEL:
            return nothing, Formula("2 (T-1)/T H x", 2 * share * sizes.hidden * x)
        case Subject.LOSS_VOCAB_PARALLEL:
            return Formula("2 b s x (T-1)", 2.0 * tokens * x * (T - 1)), nothing


_KEPT = {
    Subject.EMBEDDING_ROWWISE: "V/T × H",
    Subject.EMBEDDING_COLWISE: "V × H/T",
    Subject.EMBEDDING_ROUTED: "V/T × H",
    Subject.EMBEDDING_ROUTED_INTERLEAVED: "V/T × H",
    Subject.EMBEDDING_REPLICATED: "V × H",
    Subject.LINEAR_COLWISE: "out/T × in",
    Subject.LINEAR_ROWWISE: "out × in/T",
    Subject.NORM_SEQUENCE_PARALLEL: "H",
    Subject.LOSS_VOCAB_PARALLEL: "b s × V/T",
}

_REMEMBER = {
    Subject.EMBEDDING_ROWWISE: "To remember: one rank puts the row, all others put zeros, and a sum with zeros changes nothing. It costs a full-size exchange.",
    Subject.EMBEDDING_COLWISE: "To remember: everyone has a slice of everything, and one swap makes whole rows. It sends 1/T of what rowwise sends.",
    Subject.EMBEDDING_ROUTED: "To remember: all ranks see the same ids, so owners can send exactly the rows that are needed, each once.",
    Subject.EMBEDDING_ROUTED_INTERLEAVED: "To remember: as routed, but the frequent rows are spread over all ranks, so no rank sends far more than the others.",
    Subject.EMBEDDING_REPLICATED: "To remember: forward is free, but every rank keeps the whole table, and backward sends its whole gradient.",
    Subject.LINEAR_COLWISE: "To remember: cut by outputs, nothing is summed forward. Copy forward means sum backward.",
    Subject.LINEAR_ROWWISE: "To remember: cut by inputs, the parts are summed forward. Sum forward means copy backward.",
    Subject.NORM_SEQUENCE_PARALLEL: "To remember: tokens are independent, weights are not: their gradient must be summed over the ranks.",
    Subject.LOSS_VOCAB_PARALLEL: "To remember: two numbers per token are enough; the logits stay where they are.",
}


def _formula_text(formula: Formula) -> str:
    if not formula.bytes:
        return "0 B"
    bytes_ = f"{formula.bytes:g} B"
    return f"by the text; bound {formula.text} = {bytes_}" if formula.is_bound else f"{formula.text} = {bytes_}"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _commas(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _listing(texts: Iterable[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


def _numbered(what: str, numbers: list[int]) -> str:
    """`token 3`, `tokens 0 and 2`."""
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {_listing(map(str, numbers))}"


def _span(numbers: Iterable[int], what: str) -> str:
    """`ids 0 to 3` where they follow each other, `ids 0, 2 and 4` where not."""
    found = list(numbers)
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{what}s {found[0]} to {found[-1]}"
    return _numbered(what, found) if found else f"no {what}s"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
