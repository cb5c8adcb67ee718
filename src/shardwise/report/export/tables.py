"""Export -> tables and words: what was written, what it leaves out, and what that costs."""

from collections.abc import Iterator

from shardwise.core.export import Cost, Export, LeftOut
from shardwise.report.common.page import draw
from shardwise.report.common.plain import name, plain, sentence
from shardwise.report.common.table import Block, Column, Columns, Line, Report, Table, Tone, Words, tabled
from shardwise.report.common.units import format_bytes, format_seconds


def export_report(made: Export) -> Report:
    title = f"{name(made.plan)} for {name(made.model)} on {name(made.mesh)}, as {made.format}"
    blocks: list[Block] = [Words(tuple(headline(made)), title, boxed=True)]
    if made.left_out:
        blocks.append(left_out_table(made))
        blocks.append(Words(tuple(cost_lines(made))))
    if made.notes:
        blocks.append(Words(tuple(Line(sentence(note)) for note in made.notes), items=True))
    if made.prove is not None:
        blocks.append(Words((Line(plain(made.prove), lead="Prove it, in that folder:"),)))
    return Report(title, tuple(blocks))


def headline(made: Export) -> Iterator[Line]:
    files = ", ".join(file.name for file in made.files)
    yield Line(f"{files}: {made.about}.")
    if made.left_out:
        count = len(made.left_out)
        yield Line(
            f"It can't say all of the plan: {count} thing{'s' * (count > 1)} {'are' if count > 1 else 'is'} "
            "left out.",
            Tone.CAUTION,
        )
    else:
        yield Line("It says all of the plan.", Tone.GOOD)


def left_out_table(made: Export) -> Table:
    columns: Columns[LeftOut] = (
        (Column("left out", wraps=True), lambda each: name(each.asked)),
        (Column("what stands instead", wraps=True), lambda each: name(each.instead)),
        (Column("why", wraps=True, spills=True), lambda each: sentence(each.why)),
    )
    return tabled(made.left_out, columns, key="left_out", title="What it can't say")


def cost_lines(made: Export) -> Iterator[Line]:
    """What it costs, or why nobody can tell."""
    cost = made.cost
    if cost is None:
        if made.why_no_cost:
            yield Line(f"What that costs isn't predicted: {sentence(made.why_no_cost)}", Tone.CAUTION)
        return
    yield Line(
        f"By predict on {name(cost.machine)}: a step of {format_seconds(cost.said_s)} where the plan has "
        f"{format_seconds(cost.asked_s)}: {_percent(cost)}.",
        Tone.CAUTION if cost.ratio > 1 else Tone.PLAIN,
    )
    if cost.terms:
        parts = (
            f"{term} {'+' if seconds > 0 else '-'}{format_seconds(abs(seconds))}"
            for term, seconds in cost.terms
        )
        yield Line(f"Of that: {', '.join(parts)}.")
    fits = "" if cost.fits else ", which doesn't fit in its memory"
    yield Line(
        f"Memory of a rank: {format_bytes(cost.said_bytes)} where the plan has "
        f"{format_bytes(cost.asked_bytes)}{fits}."
    )


def _percent(cost: Cost) -> str:
    share = cost.ratio - 1
    if abs(share) < 0.0005:
        return "no difference"
    return f"{abs(share):.1%} {'slower' if share > 0 else 'faster'}"


def export_html(made: Export) -> str:
    """The page: the words, what is left out, and each file."""
    return draw(
        "export/export.html.j2",
        made=made,
        report=export_report(made),
        left_out=left_out_table(made) if made.left_out else None,
        headline=tuple(headline(made)),
        cost=tuple(cost_lines(made)) if made.left_out else (),
    )
