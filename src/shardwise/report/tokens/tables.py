"""TokenFolder -> words and a table: how much, of what, and whether it is whole."""

from collections.abc import Iterator

from shardwise.core.token_folder import TokenFolder
from shardwise.report.common.page import draw
from shardwise.report.common.plain import name, plain
from shardwise.report.common.table import Block, Column, Columns, Line, Report, Table, Tone, Words, tabled
from shardwise.report.common.units import format_bytes


def tokens_report(done: TokenFolder) -> Report:
    blocks: list[Block] = [Words(tuple(headline(done)), name(done.folder), boxed=True), facts_table(done)]
    if done.problems:
        blocks.append(Words(tuple(Line(plain(each), Tone.BAD) for each in done.problems), items=True))
    return Report(name(done.folder), tuple(blocks))


def headline(done: TokenFolder) -> Iterator[Line]:
    text = done.text
    several = "s" * (text.documents > 1)
    yield Line(f"{text.tokens:,} tokens of {text.documents:,} document{several}.")
    if not done.checked:
        yield Line(f"Read them in any verb: --text {plain(done.folder)}")
    elif done.problems:
        yield Line("It isn't whole: don't train on it. Copy it again, or write it anew.", Tone.BAD)
    else:
        yield Line("It is whole: every file is as the manifest says.", Tone.GOOD)


def facts_table(done: TokenFolder) -> Table:
    text = done.text
    ends = "a line feed, where it has none" if done.end_id is None else f"token {done.end_id}"
    facts = (
        ("text", name(text.source)),
        ("tokenizer", name(text.tokenizer)),
        ("ids", f"{text.vocab_size:,}, of which {text.distinct_ids:,} occur"),
        ("behind each document", ends),
        ("files", f"{done.shards:,} of ids ({done.dtype}), {format_bytes(done.bytes)}"),
        ("digest", text.digest),
    )
    columns: Columns[tuple[str, str]] = (
        (Column("what"), lambda fact: fact[0]),
        (Column("is", wraps=True), lambda fact: fact[1]),
    )
    return tabled(facts, columns, key="facts")


def tokens_html(done: TokenFolder) -> str:
    """The page: the same."""
    return draw(
        "tokens/tokens.html.j2",
        done=done,
        report=tokens_report(done),
        headline=tuple(headline(done)),
        facts=facts_table(done),
    )
