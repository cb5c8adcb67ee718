"""Walkthrough -> the same with words: Explained. The words are walkthrough_texts.py's. Imports no torch."""

from dataclasses import dataclass, replace
from itertools import count

from shardwise.core.walkthrough import (
    Content,
    Difference,
    Exchange,
    Matrix,
    Panel,
    Phase,
    Row,
    Step,
    StepKind,
    Subject,
    Transfer,
    Walkthrough,
)
from shardwise.walkthrough.reader import BACKWARD, FORWARD, Reader, count_of
from shardwise.walkthrough.texts import REMEMBER, TEXTS, TITLES


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
    reader = Reader(walkthrough)
    texts = TEXTS[walkthrough.subject](reader)
    group, _, name = walkthrough.subject.partition("/")
    return Explained(
        subject=walkthrough.subject,
        group=group.capitalize(),
        name=name.replace("_", " "),
        title=TITLES[walkthrough.subject],
        lead=(
            f"{walkthrough.module}: a toy of it on {reader.T} ranks. Every number below was recorded while the style really ran; none is typed in."
        ),
        ranks=reader.T,
        steps=tuple(
            _explained_step(reader, step, *texts[step.phase, step.kind]) for step in walkthrough.steps
        ),
        summary=_summary(reader),
        agrees=walkthrough.agrees,
    )


def _explained_step(reader: Reader, step: Step, title: str, words: tuple[str, ...]) -> ExplainedStep:
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
    name = str(exchange.collective).replace("_", "-")
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
    return f"{count_of(transfer.rows, 'row')}{zeros} · {transfer.bytes} B"


def _explained_panel(reader: Reader, step: Step, panel: Panel) -> ExplainedPanel:
    title = "Unsharded" if panel.rank is None else f"Rank {panel.rank}"
    holds = tuple(_explained_matrix(reader, step, panel, matrix) for matrix in panel.holds)
    return ExplainedPanel(
        panel.rank,
        title,
        _numbered_arrivals(holds) if step.kind is StepKind.EXPAND else holds,
        tuple(_explained_matrix(reader, step, panel, matrix) for matrix in panel.gets),
    )


def _explained_matrix(reader: Reader, step: Step, panel: Panel, matrix: Matrix) -> ExplainedMatrix:
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
        replace(
            matrix, row_labels=tuple(f"arrival {next(arrivals)} · {label}" for label in matrix.row_labels)
        )
        for matrix in matrices
    )


def _caption(reader: Reader, step: Step, panel: Panel, matrix: Matrix) -> str:
    kind = reader.walkthrough.subject.partition("/")[0]
    is_self = matrix.peer is not None and matrix.peer == panel.rank
    match matrix.content:
        case Content.PARAMETER:
            return {
                "embedding": "its part of the table",
                "linear": "its part of the weight",
                "norm": "the weight",
            }.get(kind, "its logits")
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


def _row_label(reader: Reader, matrix: Matrix, row: Row) -> str:
    kind = reader.walkthrough.subject.partition("/")[0]
    item = {"embedding": "id", "linear": "output"}.get(kind, "label")
    if row.token is None:
        return "" if row.item is None else f"{item} {row.item}"
    if kind == "loss" and row.item is None:
        return f"token {row.token} · no label"
    if row.item is None or matrix.content is Content.IDS:
        return f"token {row.token}"
    return f"token {row.token} · {item} {row.item}"


def _column_labels(reader: Reader, step: Step, matrix: Matrix) -> tuple[str, ...]:
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


def _summary(reader: Reader) -> Summary:
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
    rows.append(
        ("formula", _KEPT[walkthrough.subject], *(_formula_text(formula) for formula in formulas), "as kept")
    )
    equal = (
        "Output and every gradient are equal to the unsharded module's."
        if walkthrough.agrees
        else "The output or a gradient is NOT equal to the unsharded module's."
    )
    return Summary(
        title="What each rank kept and sent",
        words=(REMEMBER[walkthrough.subject], equal),
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


def _formula_text(formula: Formula) -> str:
    if not formula.bytes:
        return "0 B"
    bytes_ = f"{formula.bytes:g} B"
    return (
        f"by the text; bound {formula.text} = {bytes_}" if formula.is_bound else f"{formula.text} = {bytes_}"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
