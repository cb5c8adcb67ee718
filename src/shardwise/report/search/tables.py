"""Search -> tables and words: the best plan and how sure it is, what comes near it, what was refused, what
decides, what was open."""

import math
from collections.abc import Iterator

from shardwise.core.search import Considered, Found, Known, Refused, Search, Tipping, plan_name
from shardwise.report.common.plain import name, plain, sentence, step_text
from shardwise.report.common.table import (
    ABSENT,
    Block,
    Cell,
    Column,
    Columns,
    Line,
    Report,
    Row,
    Table,
    Tone,
    Words,
    row,
    tabled,
)
from shardwise.report.common.units import BAR, BYTES, COUNT, PERCENT, RATIO, SECONDS, Format
from shardwise.report.export import tables as export_tables
from shardwise.report.predict.rows import assumptions
from shardwise.report.predict.tables import assumed_words, constants_table
from shardwise.report.search import commands, rows

# rows of a terminal's tables
_REASONS = 8
# of the page's table of all; a CSV file has them all
_CONSIDERED = 200
_WHOLE = Format("{:,}".format)


def search_report(search: Search) -> Report:
    blocks: list[Block] = [answer_words(search)]
    if search.found:
        blocks.append(found_table(search))
        if told := tuple(ties(search)):
            blocks.append(Words(told))
        blocks.append(terms_table(search.found))
        blocks += [
            Words(tuple(export_lines(search, index)), f"Written for a framework: plan {index + 1}")
            for index in exported(search)
        ]
    if search.tippings:
        blocks.append(tippings_table(search))
    if search.refused:
        blocks.append(refused_table(search))
    blocks += [space_table(search), Words(tuple(effort(search)))]
    if search.found:
        blocks.append(next_words(search, 0))
        blocks.append(assumed_words(assumed(search), search.machine))
    appendix = (considered_table(search), constants_table(search.machine))
    return Report(rows.title(search), tuple(blocks), appendix)


def answer_words(search: Search) -> Words:
    lines = [Line(setting_text(search), Tone.QUIET)]
    if search.found:
        lines += answer_lines(search)
    else:
        lines += rows.nothing_lines(search)
    return Words(tuple(lines), rows.title(search), boxed=True)


def setting_text(search: Search) -> str:
    settings = search.settings
    if settings.batch:
        return step_text(settings)
    return f"sequence {settings.seq:,} · {name(settings.precision, '(dtype)')}"


def answer_lines(search: Search) -> Iterator[Line]:
    best = search.found[0]
    yield from rows.plan_lines(best)
    yield Line(f"{rows.speed_text(best)}.", Tone.STRONG, "Time:")
    tone = Tone.PLAIN if best.memory.fits else Tone.BAD
    yield Line(f"{rows.memory_text(search, best.memory)}.", tone, "Memory:")
    yield rows.standing(search)
    yield rows.proof_line(best)


def ties(search: Search) -> Iterator[Line]:
    if len(search.found) > 1 or search.error is None:
        yield Line(rows.ties_text(search))


def effort(search: Search) -> Iterator[Line]:
    yield Line(rows.effort_text(search), lead="Looked at:")
    if search.seconds:
        yield Line(f"{rows.seconds_text(search)}.", lead="Took:")
    yield from (Line(sentence(note)) for note in search.notes)


def found_table(search: Search) -> Table:
    """The best and its runners-up: under each what sets it apart, and what costs it the lead."""
    best = search.found[0]
    columns = (
        Column("Plan"),
        Column("Mesh", wraps=True),
        Column("Step", SECONDS),
        Column("of the best", RATIO),
        Column("Tokens/s per device", COUNT),
        Column("Memory of a device", BYTES),
        Column("Proof", wraps=True),
    )
    body = tuple(_found_row(index, each, best) for index, each in enumerate(search.found))
    title = "The best, and what comes near it" if len(body) > 1 else "The only one found"
    return Table("found", title, columns, body)


def _found_row(index: int, each: Found, best: Found) -> Row:
    proof, tone = rows.proof_word(each)
    below = [Line(rows.more_text(each.candidate, best.candidate), Tone.QUIET)]
    if index and each.costs:
        below.append(Line(rows.costs_text(each.costs), Tone.QUIET, "Against plan 1:"))
    return row(
        str(index + 1),
        Cell(each.candidate.short_mesh, tone=Tone.PLAIN if index else Tone.STRONG),
        each.step_s,
        Cell(each.step_s / best.step_s, rows.slower_text(each, best) if index else "1"),
        each.tokens_per_s_per_device,
        each.memory.device_bytes,
        Cell(proof, tone=tone),
        below=tuple(line for line in below if line.text),
    )


def terms_table(found: tuple[Found, ...]) -> Table:
    """Where the best one's step goes."""
    best = found[0]
    columns = (Column("Term", wraps=True), Column("time", SECONDS), Column("share", PERCENT), Column("", BAR))
    most = max((seconds for _, seconds in best.terms), default=0.0)
    body = tuple(
        row(Cell(term.value, mark=f"t-{term.name.lower()}"), seconds, seconds / best.step_s, seconds / most)
        for term, seconds in best.terms
        if seconds
    )
    return Table("terms", "Where a step of plan 1 goes", columns, body)


def tippings_table(search: Search) -> Table:
    columns: Columns[Tipping] = (
        (Column("A constant of the machine", wraps=True), lambda each: sentence(each.constant)),
        (Column("what wins", wraps=True), lambda each: Cell(each.factor, rows.tipping_text(each))),
    )
    deciding = [each for each in search.tippings if each.factor is not None]
    told = rows.unmoved_text(search)
    notes = [Line(told)] if told else []
    return tabled(deciding, columns, key="tippings", title="What decides", notes=notes)


def refused_table(search: Search) -> Table:
    columns: Columns[Refused] = (
        (Column("Why", wraps=True), lambda each: sentence(each.reason)),
        (Column("candidates", _WHOLE, sums=True), lambda each: each.candidates),
    )
    most_first = sorted(search.refused, key=lambda each: -each.candidates)
    return tabled(most_first, columns, key="refused", title="What was refused", short=_REASONS)


def space_table(search: Search) -> Table:
    columns = (Column("What"), Column("is one of", wraps=True))
    body = tuple(row(what, choices) for what, choices in rows.space_rows(search))
    return Table("space", "What was open", columns, body)


def considered_table(search: Search) -> Table:
    """Every point of the picture, those that fit first, each part by time."""
    columns: Columns[Considered] = (
        (Column("Candidate", wraps=True), lambda each: sentence(each.candidate.label)),
        (Column("Step", SECONDS), lambda each: each.step_s),
        (Column("Memory of a device", BYTES), _known_bytes),
        (Column("Fits"), _fits),
        (Column("Known"), lambda each: KNOWN[each.known]),
    )
    ordered = sorted(search.considered, key=lambda each: (not each.fits, each.step_s))
    return tabled(
        ordered, columns, key="considered", title="All that was considered", sorts=True, long=_CONSIDERED
    )


def _known_bytes(each: Considered) -> Cell:
    return Cell(each.device_bytes) if math.isfinite(each.device_bytes) else Cell(None, ABSENT)


def _fits(each: Considered) -> Cell:
    return Cell("yes", tone=Tone.GOOD) if each.fits else Cell("no", tone=Tone.BAD)


KNOWN = {
    Known.PREDICTED: "predicted",
    Known.COMPOSED: "put together from pieces",
    Known.BOUND: "at least that much",
}


def exported(search: Search) -> tuple[int, ...]:
    """Places of the plans that were to be written for a framework."""
    return tuple(
        index
        for index, each in enumerate(search.found)
        if each.export is not None or each.why_not_exported is not None
    )


def export_lines(search: Search, index: int) -> Iterator[Line]:
    """What was written of a plan, and what of it the format can't say; or why nothing was."""
    found = search.found[index]
    made = found.export
    if made is None:
        yield Line(sentence(found.why_not_exported or ""), Tone.CAUTION, "Not written:")
        return
    yield Line(f"{commands.export_folder(index)}, in the folder of --out", lead=f"{name(made.format)}:")
    if found.proof is None:
        yield Line("It is written all the same: prove it before you train.", Tone.CAUTION, "NOT VERIFIED.")
    yield from export_tables.headline(made)
    for each in made.left_out:
        said = f"{name(each.asked)} (here: {name(each.instead)}): {sentence(each.why)}"
        yield Line(said, lead="Left out:")
    if made.left_out:
        yield from export_tables.cost_lines(made)
    yield from (Line(sentence(note)) for note in made.notes)
    if made.prove is not None:
        yield Line(plain(made.prove), lead="Prove it, in that folder:")


def next_words(search: Search, index: int) -> Words:
    """Where the plan's files are, and what to type next."""
    case = commands.case_name(index)
    plan = f"{plan_name(index)} with each rule's reason, " if search.found[index].plan else ""
    lines = [Line(f"--out FOLDER writes {plan}{case} and the page. In that folder:")]
    lines += [
        Line(sentence(command), lead=f"{what.capitalize()}:")
        for what, command in commands.next_commands(search, index)
    ]
    return Words(tuple(lines), "Go on")


def assumed(search: Search) -> tuple[str, ...]:
    """What the best one's prediction takes for granted."""
    best = search.found[0]
    return assumptions(best.settings, best.setup, best.candidate.mesh, search.machine)
