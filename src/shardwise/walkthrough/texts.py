"""The words of a walk-through, for someone who has never heard of tensor parallelism: a title and sentences for each step of each subject.

Every number in a sentence is read from the record; what is said about a style is true of the style, whatever the numbers are.
"""

from collections.abc import Callable

from shardwise.core.walkthrough import Content, Phase, Role, StepKind, Subject
from shardwise.walkthrough.reader import (
    BACKWARD,
    FORWARD,
    Reader,
    capital,
    commas,
    count_of,
    number,
    numbered,
)

Text = tuple[str, tuple[str, ...]]
Texts = dict[tuple[Phase, StepKind], Text]

TITLES = {
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


REMEMBER = {
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


def _embedding_start(reader: Reader) -> Text:
    ids = reader.ids()
    return (
        "Every rank sees all the ids",
        (
            f"The text has {len(ids)} tokens, with the ids {commas(ids)}. Every rank is given all of them.",
            f"In the end {reader.spans('must have the rows of', reader.result_tokens, 'token')}: its own part of the sequence.",
        ),
    )


def _rowwise(reader: Reader) -> Texts:
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
                f"The table has {reader.sizes.vocabulary} rows, one for each token id. {capital(reader.spans('keeps the rows of', reader.kept_items, 'id'))}.",
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
                f"{capital(reader.wire_rows(FORWARD))}. On T ranks (T-1)/T of them are, on average: that is the price of rowwise.",
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
                f"{capital(reader.wire_rows(BACKWARD))}.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): _row_gradient(reader),
    }


def _colwise(reader: Reader) -> Texts:
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
                f"{capital(reader.wire_rows(FORWARD))}; a row here is only {count_of(len(reader.kept_columns(0)), 'number')} long.",
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
                f"{capital(reader.wire_rows(BACKWARD))}.",
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


def _routed(reader: Reader) -> Texts:
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
            (f"{capital(reader.spans('keeps the rows of', reader.kept_items, 'id'))}.", deal),
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
                f"In all {count_of(sum(len(matrix.rows) for r in reader.ranks for matrix in reader.panel(StepKind.ROUTE, FORWARD, r).holds), 'row')} "
                f"are listed for {tokens} tokens. No mask, no rows of zeros.",
            ),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Send exactly those rows",
            (
                f"{capital(reader.wire_rows(FORWARD))}. Rows that their owner needs itself stay.",
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
            (
                f"The same way in the other direction: each rank sends what it received. {capital(reader.wire_rows(BACKWARD))}.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): _row_gradient(reader),
    }


def _replicated(reader: Reader) -> Texts:
    _, whole = reader.kept_bytes()
    return {
        (FORWARD, StepKind.CUT): (
            "The table is not cut",
            (
                f"Every rank keeps all {reader.sizes.vocabulary} rows: {whole} bytes on each of {reader.T} ranks.",
            ),
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


def _linear_colwise(reader: Reader) -> Texts:
    kept, whole = reader.kept_bytes()
    return {
        (FORWARD, StepKind.CUT): (
            "The weight is cut by outputs",
            (
                f"Each row of the weight makes one output. {capital(reader.spans('keeps the rows of', reader.kept_items, 'output'))}: {kept} of {whole} bytes.",
                "(It is called colwise because the field writes y = x A, where these rows are the columns of A.)",
            ),
        ),
        (FORWARD, StepKind.INPUT): (
            "Each rank has its own part of the sequence",
            ("But an output needs whole tokens, and every rank has to make its outputs for all tokens.",),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Everyone gets all the tokens",
            (
                f"An all-gather along the sequence: each rank sends its tokens to all others. {capital(reader.wire_rows(FORWARD))}.",
            ),
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
            (
                "A token went into the outputs of all ranks. Each rank knows what comes back from its own outputs: one summand.",
            ),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Add up the parts, and keep your tokens",
            (
                f"A reduce-scatter: forward copied to all, so backward sums from all. {capital(reader.wire_rows(BACKWARD))}.",
            ),
        ),
        (BACKWARD, StepKind.INPUT_GRADIENT): (
            "The gradient of the input, for the own tokens",
            ("It is the sum over the ranks, and it is what the unsharded module gives.",),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "The gradient of the weight is local already",
            (
                "Each rank saw all tokens and the gradient of its own outputs: all that its rows need. Nothing more is sent.",
            ),
        ),
    }


def _linear_rowwise(reader: Reader) -> Texts:
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
            (
                "That is what a colwise layer before it leaves: the two fit without any exchange between them.",
            ),
        ),
        (FORWARD, StepKind.COMPUTE): (
            "Each rank computes a part of every sum",
            (
                "An output is a sum over all features, and a rank has only some of them. So what it has is one summand of every output.",
            ),
        ),
        (FORWARD, StepKind.EXCHANGE): (
            "Add up over the ranks, and keep your part of the sequence",
            (
                "A reduce-scatter: each rank sends the others the parts of their tokens, and adds what it gets to what it has.",
                f"{capital(reader.wire_rows(FORWARD))}.",
            ),
        ),
        (FORWARD, StepKind.RESULT): (
            "Whole outputs for the own tokens",
            ("The sum of the parts is the whole product: the same as without sharding.",),
        ),
        (BACKWARD, StepKind.GRADIENT_IN): (
            "Backward: the gradient of the output comes in",
            (
                "Each rank is given the gradient of its own tokens only, but its piece of the weight worked on all tokens.",
            ),
        ),
        (BACKWARD, StepKind.EXCHANGE): (
            "Everyone gets everyone's gradients",
            (
                f"An all-gather along the sequence: forward summed, so backward copies. {capital(reader.wire_rows(BACKWARD))}.",
            ),
        ),
        (BACKWARD, StepKind.INPUT_GRADIENT): (
            "The gradient of the own features",
            (
                "Each rank's columns give the gradient of just the features that it had. It stays cut, as the layer before wants it.",
            ),
        ),
        (BACKWARD, StepKind.GRADIENT): (
            "The gradient of the weight is local",
            (
                "Each rank has its features and the gradient of all tokens: all that its columns need. Nothing more is sent.",
            ),
        ),
    }


def _norm(reader: Reader) -> Texts:
    return {
        (FORWARD, StepKind.CUT): (
            "Every rank keeps the whole weight",
            (f"It is small: {count_of(reader.sizes.hidden, 'number')}. What is cut is the sequence.",),
        ),
        (FORWARD, StepKind.INPUT): (
            "Each rank has its own part of the sequence",
            ("A norm looks at one token at a time, so it never needs another rank's tokens.",),
        ),
        (FORWARD, StepKind.RESULT): (
            "Norm your own tokens: nothing is sent",
            (
                "Each rank does 1/T of the work and keeps 1/T of the activations. The result is what the unsharded module gives.",
            ),
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


def _loss(reader: Reader) -> Texts:
    rows, _ = reader.walkthrough.sent_rows(FORWARD)
    numbers = len(reader.walkthrough.step(StepKind.EXCHANGE, FORWARD).of_rank(0).holds[0].rows[0].values)
    loss = reader.matrix(StepKind.RESULT, FORWARD, 0, Content.OUTPUT).rows[0].values[0]
    owners = reader.matrix(StepKind.OWNERS, FORWARD, 0, Content.LOCAL_ROWS).rows
    ignored = [row.token for row in owners if row.role is Role.IGNORED and row.token is not None]
    left_out = f" {capital(numbered('token', ignored))} has no label and doesn't count." if ignored else ""
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
                f"{capital(count_of(numbers, 'number'))} per token from each rank to each other: {rows} rows, {reader.total_bytes(FORWARD)} bytes in all. "
                "The vocabulary doesn't matter.",
            ),
        ),
        (FORWARD, StepKind.RESULT): (
            "Every rank has the loss",
            (
                "The ranks' log-sums make one log-sum, and the label's logit comes from its owner: the others gave 0. "
                f"Every rank finds the same mean loss, {number(loss)}.",
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


def _token_result(reader: Reader) -> Text:
    return (
        "Whole rows for the own tokens",
        (
            f"{capital(reader.spans('has', reader.result_tokens, 'token'))}. The unsharded module gives the same rows for the same ids.",
        ),
    )


def _row_gradient(reader: Reader) -> Text:
    return (
        "Add up the gradients of the rows you own",
        (
            f"{reader.sum_of_repeated()} Ids that didn't occur get zeros.",
            "A rank's gradient has the shape of its part of the table: it needs no further exchange, and the optimizer can go on.",
        ),
    )


TEXTS: dict[Subject, Callable[[Reader], Texts]] = {
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
