"""Beside -> tables and words: a predicted step beside a measured one, by term, by module and op, and by what
each instant is booked on."""

from collections.abc import Iterator, Sequence

from shardwise.core.beside import Beside, BesideLine, LineKind, TermLine
from shardwise.core.difference import Use
from shardwise.profiles.beside_words import line_name
from shardwise.report.common.table import (
    Block,
    Cell,
    Column,
    Columns,
    Line,
    Report,
    RowKind,
    Table,
    Tone,
    Words,
    row,
    tabled,
)
from shardwise.report.common.units import PERCENT, Format
from shardwise.report.diff import rows
from shardwise.report.diff.tables import CALLS, NS, SIGNED_NS, collectives_tables, cut_steps

RATIO = Format("{:.2f}".format)
_SIDES = ("predicted_ns", "measured_ns")
NOT_MODELLED, NOT_TOLD = "not modelled", "not told apart"
_TABLES = ((LineKind.WORK, "work", "Kernels"), (LineKind.EXCHANGE, "exchanges", "Exchanges with other ranks"))
_ISSUING = (LineKind.ISSUING, "issuing", "Issuing (launches, and the host between them)")


def beside_report(both: Beside) -> Report:
    """The measured step beside the predicted one."""
    blocks: list[Block] = [_about(both)]
    if both.verdict:
        blocks.append(Words(tuple(map(Line, both.verdict)), "In words", boxed=True))
    blocks += [terms_table(both), *lines_tables(both), parts_table(both)]
    blocks += collectives_tables([both.measured])
    if notes := _notes(both):
        blocks.append(notes)
    return Report(title(both), tuple(blocks))


def title(both: Beside) -> str:
    return f"Predicted beside measured: {both.predicted.label}"


def _about(both: Beside) -> Words:
    predicted = both.predicted
    mesh = ",".join(f"{name}={size}" for name, size in predicted.axes)
    said = f"{predicted.model}, {mesh}, on {predicted.machine}"
    return Words(
        (
            Line(said, lead=f"predicted, {predicted.plan}:"),
            Line(rows.about(both.measured), lead=f"measured, {both.measured.label}:"),
        )
    )


def terms_table(both: Beside) -> Table:
    """Every term that a side has; they add up to both steps."""
    return terms_of(both.terms, "terms", "By term")


def terms_of(terms: Sequence[TermLine], key: str, title: str) -> Table:
    """The terms of a step, predicted beside measured."""
    off_ns = sum(abs(each.delta_ns) for each in terms)
    columns: Columns[TermLine] = (
        (Column("Term", wraps=True), lambda each: each.term),
        (Column("predicted", NS, sums=True), _predicted),
        (Column("measured", NS, sums=True), _measured),
        (Column("off", SIGNED_NS, sums=True), lambda each: off(each.delta_ns)),
        (Column("ratio", RATIO), lambda each: _ratio(each.predicted_ns, each.measured_ns)),
        (Column("of all", PERCENT), lambda each: abs(each.delta_ns) / off_ns if off_ns else 0.0),
    )
    step = tuple(sum(getattr(each, side) or 0.0 for each in terms) for side in _SIDES)
    total = row("step", *step, off(step[0] - step[1]), _ratio(*step), None, kind=RowKind.TOTAL)
    notes = [
        Line(
            "Off: predicted less measured; above 0 it was predicted too slow. Of all: of what terms are off "
            "by, either way. The terms add up to both steps.",
            Tone.QUIET,
        )
    ]
    return tabled(terms, columns, total, key=key, title=title, notes=notes)


def _predicted(each: TermLine) -> Cell:
    return Cell(each.predicted_ns, NOT_MODELLED if each.predicted_ns is None else None)


def _measured(each: TermLine) -> Cell:
    return Cell(each.measured_ns, NOT_TOLD if each.measured_ns is None else None)


def off(ns: float) -> Cell:
    """Neither way is better."""
    return Cell(ns, tone=Tone.CAUTION if ns else Tone.PLAIN)


def _ratio(predicted_ns: float | None, measured_ns: float | None) -> float | None:
    return predicted_ns / measured_ns if predicted_ns is not None and measured_ns else None


def lines_tables(both: Beside) -> Iterator[Table]:
    """Kernels, exchanges and issuing, each line's pass, module, op and shapes; those that are off most
    first."""
    columns: Columns[BesideLine] = (
        (Column("Work", wraps=True), _what),
        (Column("calls", CALLS, of="predicted"), lambda line: _calls(line, line.predicted)),
        (Column("predicted", NS, sums=True), lambda line: line.predicted.ns),
        (Column("calls", CALLS, of="measured"), lambda line: _calls(line, line.measured)),
        (Column("measured", NS, sums=True), lambda line: line.measured.ns),
        (Column("off", SIGNED_NS, sums=True), lambda line: off(line.delta_ns)),
        (Column("ratio", RATIO), lambda line: _ratio(line.predicted.ns, line.measured.ns)),
        (Column("Found", spills=True), _found),
    )
    for kind, key, name in (*_TABLES, _ISSUING):
        lines = [line for line in both.lines if line.kind is kind]
        if lines:
            yield tabled(
                lines,
                columns,
                key=key,
                title=f"{name}: what is off most, of {len(lines)} lines",
                sorts=True,
                short=8,
                long=60,
            )


def _what(line: BesideLine) -> Cell:
    about = rows.shortened(line.shapes, 48)
    return Cell(line_name(line), rows.shortened(line_name(line), 72), about=about)


def _calls(line: BesideLine, use: Use) -> float | None:
    """Of issuing, what is called differs: a prediction has the ops, a profile all that the CPU does."""
    return None if line.kind is LineKind.ISSUING else use.count


def _found(line: BesideLine) -> str:
    """`matmul, by op and shapes: aten::mm`."""
    others = [name for name in line.names if name != line.op]
    names = f": {', '.join(rows.shortened(name, 40) for name in others)}" if others else ""
    return f"{line.term}, {line.found.value}{names}"


def parts_table(both: Beside) -> Table:
    """What each instant is booked on, on both sides."""
    steps = [("predicted", both.predicted.parts), ("measured", both.measured.parts)]
    return cut_steps("parts", "A step of one rank, cut as profiles are", steps)


def found_words(both: Beside) -> str:
    """How much of the measured work is in a line with the prediction's, by what."""
    by = both.by_found()
    whole = sum(by.values())
    shares = [f"{100 * ns / whole:.0f} % {found.value}" for found, ns in by.items() if whole and ns]
    return f"Of the measured work: {', '.join(shares)}."


def _notes(both: Beside) -> Words | None:
    lines: Sequence[Line] = [
        Line(found_words(both), Tone.QUIET),
        *(Line(f"{note}.", Tone.CAUTION, "predicted:") for note in both.predicted.notes),
        *(Line(f"{line}.", Tone.CAUTION, "measured:") for line in rows.cautions(both.measured)),
    ]
    return Words(tuple(lines)) if lines else None
