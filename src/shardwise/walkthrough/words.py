"""Walkthrough -> Explained: the words of the subject's file, with its names filled in. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from shardwise.core.collective import collective_name
from shardwise.core.walkthrough import (
    Content,
    Difference,
    Exchange,
    Matrix,
    Panel,
    Phase,
    Row,
    Sizes,
    Step,
    StepKind,
    Transfer,
    Walkthrough,
)
from shardwise.walkthrough.reader import Reader, count_of
from shardwise.walkthrough.subject import Subject, Wire, subject_named


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
    """wire: what the collective is called and does. agreement: how it compares with the unsharded module."""

    title: str
    words: str
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
    words: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Explained:
    """group and name: where it stands among others, such as "Embedding" and "rowwise"."""

    subject: str
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
    subject = subject_named(walkthrough.subject)
    group, _, name = subject.name.partition("/")
    ranks = walkthrough.sizes.ranks
    return Explained(
        subject=subject.name,
        group=group.capitalize(),
        name=name.replace("_", " "),
        title=subject.title,
        lead=(
            f"{walkthrough.module}: a toy of it on {ranks} ranks. "
            "Every number below was recorded while the style "
            "really ran; none is typed in."
        ),
        ranks=ranks,
        steps=tuple(_explained_step(walkthrough, subject, step) for step in walkthrough.steps),
        summary=_summary(walkthrough, subject),
        agrees=walkthrough.agrees,
    )


def _explained_step(walkthrough: Walkthrough, subject: Subject, step: Step) -> ExplainedStep:
    told = subject.told(step.phase, step.kind, step.part)
    again = [other for other in walkthrough.steps if other.turn and told_alike(other, step)]
    exchange = step.exchange
    transfers = () if exchange is None else exchange.transfers
    return ExplainedStep(
        title=f"{told.title} (turn {step.turn} of {len(again)})" if len(again) > 1 else told.title,
        words=Reader(walkthrough, step.phase).fill(told.words),
        phase=step.phase,
        kind=step.kind,
        panels=tuple(_explained_panel(subject.kind, step, panel) for panel in step.panels),
        wire="" if exchange is None else _wire(exchange, step.phase),
        transfers=tuple(ExplainedTransfer(transfer, _transfer_text(transfer)) for transfer in transfers),
        agreement="" if step.difference is None else _agreement(step.difference),
        agrees=step.difference is None or step.difference.agrees,
    )


def told_alike(one: Step, other: Step) -> bool:
    return (one.phase, one.kind, one.part) == (other.phase, other.kind, other.part)


def _wire(exchange: Exchange, phase: Phase) -> str:
    name = collective_name(exchange.collective)
    # a backward's collective carries the placements of the forward that it undoes
    is_change = phase is Phase.FORWARD and exchange.before != exchange.after
    return f"{name}, {exchange.before} → {exchange.after}" if is_change else name


def _agreement(difference: Difference) -> str:
    largest = difference.largest
    if largest == 0:
        return "Equal to the unsharded module, bit for bit."
    if difference.agrees:
        return f"Equal to the unsharded module up to rounding: the largest difference is {largest:.1e}."
    return f"NOT equal to the unsharded module: the largest difference is {largest:.3g}."


def _transfer_text(transfer: Transfer) -> str:
    if transfer.rows is None:
        return f"{transfer.bytes} B (a ring's share)"
    if not transfer.rows:
        return "nothing"
    zeros = f", {transfer.zero_rows} of zeros" if transfer.zero_rows else ""
    return f"{count_of(transfer.rows, 'row')}{zeros} · {transfer.bytes} B"


def _explained_panel(kind: str, step: Step, panel: Panel) -> ExplainedPanel:
    def explained(matrices: tuple[Matrix, ...]) -> tuple[ExplainedMatrix, ...]:
        return tuple(
            ExplainedMatrix(
                _caption(kind, step, panel, matrix),
                tuple(_row_label(kind, matrix, row) for row in matrix.rows),
                _column_labels(kind, matrix),
                matrix,
            )
            for matrix in matrices
        )

    title = "Unsharded" if panel.rank is None else f"Rank {panel.rank}"
    holds = explained(panel.holds)
    if step.kind is StepKind.EXPAND:
        holds = _numbered_arrivals(holds)
    return ExplainedPanel(panel.rank, title, holds, explained(panel.gets))


def _numbered_arrivals(matrices: tuple[ExplainedMatrix, ...]) -> tuple[ExplainedMatrix, ...]:
    """Rows labelled by the order in which they lie in memory, over all matrices."""
    arrivals = count()
    return tuple(
        replace(
            matrix, row_labels=tuple(f"arrival {next(arrivals)} · {label}" for label in matrix.row_labels)
        )
        for matrix in matrices
    )


# what a matrix is called; under a kind of module, what it is called there
_CAPTIONS: dict[str, dict[Content, str]] = {
    "": {
        Content.INPUT: "input",
        Content.IDS: "the ids",
        Content.LOCAL_ROWS: "is the row mine?",
        Content.EXPAND: "who takes which",
        Content.PARTIAL: "its part of the gradient",
        Content.OUTPUT: "output",
        Content.STATISTICS: "per token",
        Content.OUTPUT_GRADIENT: "gradient of the output",
        Content.INPUT_GRADIENT: "gradient of the input",
        Content.GRADIENT: "gradient of the weight",
    },
    "embedding": {Content.PARAMETER: "its part of the table", Content.GRADIENT: "gradient of the table"},
    "linear": {Content.PARAMETER: "its part of the weight"},
    "norm": {Content.PARAMETER: "the weight"},
    "experts": {
        Content.PARAMETER: "its experts",
        Content.INPUT: "its tokens, and their experts",
        Content.MADE: "what its experts make of them",
        Content.GRADIENT: "gradient of its experts",
    },
    "layers": {
        Content.PARAMETER: "its layer",
        Content.LANES: "the micro-batch in each slot",
        Content.GRADIENT: "gradient of its layer",
    },
    "attention": {
        Content.INPUT: "its tokens",
        Content.MEETS: "meets the keys of token ... in turn",
        Content.INPUT_GRADIENT: "gradient of its keys and values",
    },
    "loss": {
        Content.PARAMETER: "its logits",
        Content.LOCAL_ROWS: "is the label mine?",
        Content.OUTPUT: "the loss",
        Content.GRADIENT: "gradient of the logits",
    },
}
_COLUMN_LABELS = {
    Content.IDS: ("id",),
    Content.LOCAL_ROWS: ("its row here",),
    Content.ROUTE: ("row here",),
    Content.EXPAND: ("takes arrival",),
    Content.SENT: ("log-sum", "label's logit"),
    Content.RECEIVED: ("log-sum", "label's logit"),
    Content.STATISTICS: ("log-sum", "loss"),
}
_ITEMS = {"embedding": "id", "linear": "output", "loss": "label", "experts": "expert", "layers": "layer"}
# a token's numbers, where they have names
_NAMED_COLUMNS = {"attention": {2: ("key", "value"), 1: ("mean",)}}


def _caption(kind: str, step: Step, panel: Panel, matrix: Matrix) -> str:
    is_self = matrix.peer is not None and matrix.peer == panel.rank
    match matrix.content:
        case Content.IDS if step.kind is StepKind.OWNERS:
            return "the ids it looks up"
        case Content.ROUTE:
            return "needed here, stays" if is_self else f"rank {matrix.peer} needs"
        case Content.SENT:
            if matrix.peer is None:
                return "for every rank"
            return "for itself, stays" if is_self else f"for rank {matrix.peer}"
        case Content.RECEIVED:
            is_summed = any(other.content is Content.SUM for other in panel.gets)
            plus = "+ " if is_summed and matrix is not panel.gets[0] else ""
            return plus + ("its own, stayed" if is_self else f"from rank {matrix.peer}")
        case Content.SUM:
            return "= the sum" if len(panel.gets) > 1 else "the sum"
        case content:
            return _CAPTIONS[kind].get(content) or _CAPTIONS[""][content]


def _row_label(kind: str, matrix: Matrix, row: Row) -> str:
    if matrix.content is Content.LANES:
        return list(Phase)[row.item or 0]
    item = "" if row.item is None else f"{_ITEMS[kind]} {row.item}"
    if row.token is None:
        return item
    if kind == "loss" and row.item is None:
        return f"token {row.token} · no label"
    if row.item is None or matrix.content is Content.IDS:
        return f"token {row.token}"
    return f"token {row.token} · {item}"


def _column_labels(kind: str, matrix: Matrix) -> tuple[str, ...]:
    if kind in _NAMED_COLUMNS and matrix.rows and matrix.content is not Content.MEETS:
        return _NAMED_COLUMNS[kind][len(matrix.rows[0].values)]
    if matrix.columns:
        return tuple(f"id {column}" if kind == "loss" else str(column) for column in matrix.columns)
    if kind == "loss" and matrix.content is Content.LOCAL_ROWS:
        return ("its column here",)
    return _COLUMN_LABELS.get(matrix.content, ())


def _summary(walkthrough: Walkthrough, subject: Subject) -> Summary:
    rows: list[tuple[str, ...]] = [
        (
            f"rank {held.rank}",
            f"{_shape(held.parameter_shape)} ({held.parameter_bytes} B)",
            *(f"{walkthrough.sent_bytes(held.rank, phase)} B" for phase in Phase),
            f"{_shape(held.gradient_shape)} ({held.gradient_bytes} B)",
        )
        for held in walkthrough.held
    ]
    sent = [_formula_text(formula) for formula in formula_bytes(walkthrough)]
    rows.append(("formula", subject.keeps, *sent, "as kept"))
    equal = (
        "Output and every gradient are equal to the unsharded module's."
        if walkthrough.agrees
        else "The output or a gradient is NOT equal to the unsharded module's."
    )
    keeps = "logits" if subject.kind == "loss" else "keeps"
    return Summary(
        title="What each rank kept and sent",
        words=f"{subject.remember} {equal}",
        columns=("", keeps, "sends forward", "sends backward", "gradient"),
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class Formula:
    """Bytes that one rank sends in a phase. bound: the data decides, and this is the most, on average."""

    text: str
    bytes: float
    is_bound: bool = False


def formula_bytes(walkthrough: Walkthrough) -> tuple[Formula, Formula]:
    """(forward, backward) by the formulas of docs/rowwise-or-colwise.md and core/collective.py."""
    subject = subject_named(walkthrough.subject)
    forward, backward = (_formula(subject.wires(phase), walkthrough.sizes) for phase in Phase)
    return forward, backward


def _formula(wires: Sequence[Wire], sizes: Sizes) -> Formula:
    """Of all collectives of a phase."""
    text = " + ".join(wire.formula for wire in wires) or "0"
    total = sum(_value(wire.formula, sizes) for wire in wires)
    return Formula(text, total, any(wire.is_bound for wire in wires))


def _value(formula: str, sizes: Sizes) -> float:
    """Of a product such as `2 (T-1)/T V H x`: b s tokens, x bytes an element."""
    T = sizes.ranks
    values = {"b": sizes.batch, "s": sizes.sequence, "H": sizes.hidden, "V": sizes.vocabulary or 0, "T": T}
    values |= {"x": sizes.element_bytes, "(T-1)": T - 1, "E": sizes.experts or 0, "2": 2, "4": 4, "": 1}
    above, below = 1, 1
    for factor in formula.split():
        numerator, _, denominator = factor.partition("/")
        above *= values[numerator]
        below *= values[denominator]
    return above / below


def _formula_text(formula: Formula) -> str:
    if not formula.bytes:
        return "0 B"
    text = f"{formula.text} = {formula.bytes:g} B"
    return f"by the text; bound {text}" if formula.is_bound else text


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
