"""PredictionRun -> tables and words: the step's terms, memory against capacity, what is flagged, what was
assumed, and the machine."""

from collections.abc import Sequence

from shardwise.core.mesh import Mesh
from shardwise.core.prediction import MemoryForecast, Prediction
from shardwise.core.prediction_run import MachineFacts, PredictionRun
from shardwise.report.common.plain import name, sentence, step_text
from shardwise.report.common.table import (
    ABSENT,
    Block,
    Cell,
    Column,
    Line,
    Report,
    RowKind,
    Table,
    Tone,
    Value,
    Words,
    row,
)
from shardwise.report.common.units import BAR, BYTES, COUNT, PERCENT, RATIO, SECONDS
from shardwise.report.predict import rows


def prediction_report(run: PredictionRun) -> Report:
    blocks: list[Block] = [_headline(run)]
    if len(run.predictions) > 1:
        blocks.append(plans_table(run))
    blocks += [terms_table(run.predictions), memory_table(run.predictions)]
    flagged = tuple(Line(text, Tone.CAUTION, lead) for lead, text in rows.launch_bound(run))
    if flagged:
        blocks.append(Words(flagged))
    first = run.predictions[0]
    assumed = (
        *rows.assumptions(run.settings, first.setup, Mesh(first.axes), run.machine),
        *(note if note.endswith(".") else f"{note}." for note in rows.notes(run)),
    )
    blocks.append(assumed_words(assumed, run.machine))
    whom = rows.plan_name(first) if len(run.predictions) == 1 else f"{len(run.predictions)} plans"
    title = f"What a step would take: {name(first.model)} under {whom}"
    return Report(title, tuple(blocks), (constants_table(run.machine),))


def _headline(run: PredictionRun) -> Words:
    first = run.predictions[0]
    machine = name(run.machine.name, "(machine)")
    setting = [
        Line(f"mesh {rows.mesh_text(first)}"),
        Line(step_text(run.settings, *rows.micro_batches(first.setup))),
    ]
    if len(run.predictions) > 1:
        return Words((Line(f"on {machine}: {len(run.predictions)} plans", lead=name(first.model)), *setting))
    said = Line(rows.headline(first), Tone.STRONG if first.memory.fits else Tone.BAD)
    return Words(
        (Line(f"under plan {rows.plan_name(first)} on {machine}", lead=name(first.model)), *setting, said)
    )


def fit_cell(memory: MemoryForecast, text: str) -> Cell:
    return Cell(text, tone=Tone.GOOD if memory.fits else Tone.BAD)


def plans_table(run: PredictionRun) -> Table:
    columns = (
        Column("Plan", wraps=True),
        Column("Step", SECONDS),
        Column("Ratio", RATIO),
        Column("Tokens/s per device", COUNT),
        Column("Memory of a device", BYTES),
        Column("Fits", spills=True),
        Column("Most of the difference", wraps=True, spills=True),
    )
    body = []
    for prediction, difference in zip(run.predictions, (None, *run.differences), strict=True):
        ratio = Cell(1.0, "1") if difference is None else Cell(difference.ratio)
        most = None if difference is None else rows.difference_text(difference)
        sizes = (prediction.tokens_per_s_per_device, prediction.memory.device_bytes)
        plan = rows.plan_name(prediction)
        body.append(
            row(
                plan,
                prediction.step_s,
                ratio,
                *sizes,
                fit_cell(prediction.memory, rows.fit_text(prediction.memory)),
                most,
            )
        )
    return Table("plans", "Per plan", columns, tuple(body), sorts=True)


def terms_table(predictions: Sequence[Prediction]) -> Table:
    """Seconds and share of each term; of one plan alone with a bar."""
    alone = len(predictions) == 1
    columns = [Column("Term", wraps=True)]
    for each in predictions:
        label = "time" if alone else rows.plan_name(each)
        columns += [Column(label, SECONDS), Column("share", PERCENT, of="" if alone else label)]
    terms = rows.term_rows(predictions)
    largest = max((term.shares[0] for term in terms), default=0.0)
    body = []
    for term in terms:
        label_cell = Cell(term.term.value, mark=f"t-{term.term.name.lower()}")
        pairs = zip(term.seconds, term.shares, strict=True)
        values: list[Cell | Value] = [value for pair in pairs for value in pair]
        if term.is_off:
            values = [Cell(None, "off"), Cell()] * len(predictions)
        bar = [term.shares[0] / largest if largest else None] if alone else []
        body.append(row(label_cell, *values, *bar))
    totals = [value for each in predictions for value in (each.step_s, None)]
    body.append(row("step", *totals, *([None] if alone else []), kind=RowKind.TOTAL))
    columns += [Column("", BAR)] if alone else []
    return Table("terms", "Where the step goes", tuple(columns), tuple(body))


def memory_table(predictions: Sequence[Prediction]) -> Table:
    """Kinds at the peak; then what tensors, the allocator and the process take, and what the device has."""
    alone = len(predictions) == 1
    columns = [Column("What", wraps=True)]
    columns += [Column("bytes" if alone else rows.plan_name(each), BYTES) for each in predictions]
    first = predictions[0].memory
    scale = max(first.capacity_bytes, first.device_bytes)
    kinds = [{kind: n_bytes for kind, _, n_bytes in rows.memory_rows(each.memory)} for each in predictions]
    labels = {kind: label for each in predictions for kind, label, _ in rows.memory_rows(each.memory)}
    body = []
    for kind, label in labels.items():
        sizes = [Cell(each[kind]) if kind in each else Cell(None, ABSENT) for each in kinds]
        bar = [kinds[0].get(kind, 0) / scale] if alone else []
        body.append(row(Cell(label, mark=f"m-{kind}"), *sizes, *bar))
    for level, values in rows.levels_side_by_side(predictions):
        bar = [values[0] / scale] if alone else []
        body.append(row(level, *values, *bar, kind=RowKind.TOTAL))
    fits = [fit_cell(each.memory, rows.spare_text(each.memory)) for each in predictions]
    body.append(row("against that", *fits, *([None] if alone else []), kind=RowKind.TOTAL))
    columns += [Column("", BAR)] if alone else []
    title = rows.memory_title(predictions)
    return Table("memory", title, tuple(columns), tuple(body))


def assumed_words(lines: Sequence[str], machine: MachineFacts, *more: str) -> Words:
    told = [*lines, *more, f"Machine: {rows.machine_text(machine)}."]
    return Words(tuple(map(Line, told)), "Assumed", boxed=True, items=True)


def constants_table(machine: MachineFacts) -> Table:
    columns = (
        Column("Constant", wraps=True),
        Column("Value", wraps=True),
        Column("Unit"),
        Column("Source", wraps=True),
    )
    body = tuple(
        row(
            sentence(each.path),
            sentence(each.value),
            sentence(each.unit),
            Cell(sentence(each.source), about=f"fitted to {sentence(each.fitted)}" if each.fitted else ""),
        )
        for each in machine.constants
    )
    return Table("constants", "All constants, and where each is from", columns, body)
