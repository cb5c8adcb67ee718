"""LookUps -> tables and words: which style is the fastest for the table of token ids, and what each takes."""

from collections.abc import Iterator

from shardwise.core.look_up import TIE, LookUpPoint, LookUps, Place
from shardwise.core.mesh import TENSOR_AXIS
from shardwise.report.common.page import draw
from shardwise.report.common.plain import name, sentence
from shardwise.report.common.table import ABSENT, Block, Cell, Column, Line, Report, Table, Tone, Words, row
from shardwise.report.common.units import BYTES, COUNT, NUMBER, SECONDS, format_bytes
from shardwise.report.predict.rows import arrival
from shardwise.report.predict.tables import assumed_words, constants_table

TIED = ", tied to the head, whose collectives count too"


def look_ups_report(found: LookUps) -> Report:
    lead = f"{found.vocab:,} x {found.hidden:,}{TIED if found.is_tied else ''}"
    settings = f"sequence {found.settings.seq:,} · {name(found.settings.dtype)} · ids of {name(found.text)}"
    about = [
        Line(f"{lead}, on {name(found.machine.name)}", lead=f"the table of {name(found.model)}"),
        Line(settings),
        *(Line(text, Tone.STRONG) for text in verdict(found)),
    ]
    blocks: list[Block] = [Words(tuple(about))]
    if found.points:
        blocks += [times_table(found), points_table(found)]
    if found.refused:
        blocks.append(Words(tuple(Line(text, Tone.CAUTION) for text in left_out(found))))
    blocks.append(assumed_words(assumed(found), found.machine))
    title = f"Rowwise or colwise: the table of {name(found.model)}"
    return Report(title, tuple(blocks), (constants_table(found.machine),))


def assumed(found: LookUps) -> tuple[str, ...]:
    """What is taken for granted, a sentence each."""
    return (
        "The table alone: its look-ups, what it sends, its gradient, and its share of clipping and AdamW. "
        "The step's other work, which may hide some of it, isn't there.",
        "Waiting for the host: as at a step's beginning, where the device has nothing else to do; where the "
        "host runs ahead, add --without launch.",
        arrival(found.setup, found.machine.spread),
        "Data decide what routed sends (counted: the busiest rank's) and how many rows a mask leaves (rank "
        "0's).",
    )


def left_out(found: LookUps) -> Iterator[str]:
    """A sentence for each reason, with how many points it is for."""
    for each in found.refused:
        yield f"{each.points} left out under {name(each.plan)}: {sentence(each.reason)}"


def verdict(found: LookUps) -> Iterator[str]:
    """The fastest over runs of ranks, a sentence for each size of a batch."""
    if not found.points:
        yield "Nothing could be predicted."
        return
    batches = dict.fromkeys(place.batch for place in found.places)
    for batch in batches:
        runs: list[tuple[str, list[int]]] = []
        for place in found.places:
            if place.batch != batch:
                continue
            best = best_text(place)
            if runs and runs[-1][0] == best:
                runs[-1][1].append(place.tp)
            else:
                runs.append((best, [place.tp]))
        told = "; ".join(f"tp {_range(degrees)}: {best}" for best, degrees in runs)
        tokens = batch * found.settings.seq
        yield f"Fastest for {tokens:,} tokens: {told}."


def best_text(place: Place) -> str:
    """`routed-interleaved`, `routed or routed-interleaved`."""
    return " or ".join(name(point.plan) for point in place.best)


def _range(degrees: list[int]) -> str:
    return str(degrees[0]) if len(degrees) == 1 else f"{degrees[0]} to {degrees[-1]}"


def times_table(found: LookUps) -> Table:
    """A row for ranks and tokens, a column for each plan."""
    columns = [
        Column(TENSOR_AXIS, NUMBER),
        Column("Tokens", COUNT),
        *(Column(name(plan), SECONDS) for plan in found.plans),
        Column("Fastest", wraps=True, spills=True),
    ]
    body = []
    for place in found.places:
        by_plan = {point.plan: point for point in place.points}
        best = {point.plan for point in place.best}
        cells = [
            Cell(by_plan[plan].step_s, tone=Tone.GOOD if plan in best else Tone.PLAIN)
            if plan in by_plan
            else Cell(None, ABSENT)
            for plan in found.plans
        ]
        body.append(row(place.tp, place.batch * found.settings.seq, *cells, best_text(place)))
    note = Line(
        f"One step of the table alone, predicted. Fastest: within {100 * TIE:.0f} % of the least.", Tone.QUIET
    )
    return Table("times", "What the table takes", tuple(columns), tuple(body), (note,))


def points_table(found: LookUps) -> Table:
    """All of them, with bytes."""
    columns = (
        Column("Plan", wraps=True),
        Column(TENSOR_AXIS, NUMBER),
        Column("Tokens", COUNT),
        Column("Time", SECONDS),
        Column("Waiting for the host", SECONDS),
        Column("Busiest rank sends", BYTES),
        Column("A rank holds", BYTES),
        Column("Most in a step", BYTES),
    )
    seq = found.settings.seq
    body = tuple(
        row(
            name(point.plan), point.tp, point.batch * seq, point.step_s, point.host_s, *_bytes(point)
        )
        for place in found.places
        for point in place.points
    )  # fmt: skip
    note = Line("Holds: its part of the table, its gradient and AdamW's state, between steps.", Tone.QUIET)
    return Table("points", "What it sends and holds", columns, body, (note,), sorts=True, short=30)


def _bytes(point: LookUpPoint) -> tuple[Cell, ...]:
    sizes = (point.sent_bytes, point.held_bytes, point.peak_bytes)
    return tuple(Cell(size, format_bytes(size)) for size in sizes)


def look_ups_html(found: LookUps) -> str:
    """The page: the same."""
    report = look_ups_report(found)
    return draw(
        "predict/look_up.html.j2",
        found=found,
        report=report,
        verdict=tuple(verdict(found)),
        tables=tuple(block for block in report.blocks if isinstance(block, Table)),
        left_out=tuple(left_out(found)),
        assumed=assumed(found),
    )
