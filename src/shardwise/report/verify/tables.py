"""VerificationRun -> tables and words: the cases in a table, then those in full that aren't right; one case
alone always in full."""

from collections.abc import Iterator, Sequence

from shardwise.core.verification import Verdict, Verification, VerificationRun
from shardwise.report.common.table import Block, Cell, Column, Line, Report, Row, Table, Tone, Words, row
from shardwise.report.common.units import Format
from shardwise.report.verify import rows

TONES = {
    Verdict.RIGHT: Tone.GOOD,
    Verdict.WRONG: Tone.BAD,
    Verdict.NEARLY_NOTHING: Tone.CAUTION,
    Verdict.CRASHES: Tone.BAD,
    Verdict.TIMED_OUT: Tone.BAD,
    Verdict.SUSPECTED: Tone.BAD,
    Verdict.NOT_PROVED: Tone.CAUTION,
    Verdict.SKIPPED: Tone.QUIET,
}
_MOST_FINDINGS = 12
_MOST_NAMES = 4
_SHARDED = Format(lambda share: f"{100 * share:.0f} %", "share")
_ERROR = Format(rows.error, "relative")


def verification_report(run: VerificationRun) -> Report:
    cases = run.verifications
    blocks: list[Block] = []
    if len(cases) != 1:
        blocks = [Words((Line(f"{rows.totals(run)}: {rows.settings(run)}"),)), cases_table(cases)]
    for number, each in enumerate(cases):
        if len(cases) == 1 or each.verdict in (Verdict.WRONG, Verdict.SUSPECTED):
            blocks += _in_full(each, run, f"-{number}" if len(cases) > 1 else "")
    title = f"{cases[0].model} under {cases[0].plan}" if len(cases) == 1 else f"{len(cases)} cases"
    return Report(f"Does the plan train the model? {title}", tuple(blocks))


def cases_table(verifications: Sequence[Verification]) -> Table:
    columns = (
        Column("Model", wraps=True),
        Column("Plan", wraps=True),
        Column("Verdict"),
        Column("Sharded", _SHARDED),
        Column("Largest error", _ERROR),
        Column("Gradients compared", spills=True),
        Column("What was found", wraps=True, spills=True),
    )
    cases = tuple(_case_row(number, each) for number, each in enumerate(verifications))
    return Table("cases", "", columns, cases, sorts=True)


def _case_row(number: int, each: Verification) -> Row:
    proof = each.proof
    verdict = Cell(each.verdict, tone=TONES[each.verdict], badge=badge(each.verdict))
    compared = f"{rows.how_many(proof)} in {proof.dtype}" if proof is not None else ""
    worst = (
        max(proof.worst_gradient_error, proof.output_error, proof.loss_error) if proof is not None else None
    )
    sharded = each.sharded.inner_share if each.sharded is not None else None
    model = Cell(each.model, href=f"#case-{number}")
    return row(model, each.plan, verdict, sharded, worst, compared, rows.headline(each))


def badge(verdict: Verdict) -> str:
    """The page's classes for a verdict."""
    return f"mark v-{verdict.value.replace(' ', '-')}"


def _in_full(each: Verification, run: VerificationRun, suffix: str) -> Iterator[Block]:
    answer = Line(rows.verdict_text(each), TONES[each.verdict])
    yield Words((answer,), f"{each.model} under {each.plan}", boxed=True)
    facts = (*rows.facts(each, run.mesh), ("run", rows.settings(run)))
    columns = (Column("what"), Column("value", wraps=True))
    told = tuple(row(Cell(name, tone=Tone.QUIET), value) for name, value in facts)
    yield Table(f"facts{suffix}", "", columns, told, headed=False)
    found = rows.tree(each)
    notes = []
    if len(found) > _MOST_FINDINGS:
        notes.append(
            Line(f"... and {len(found) - _MOST_FINDINGS} more: --json or --out has them all.", Tone.QUIET)
        )
    if found:
        columns = (Column("Found", wraps=True), Column("How far off", wraps=True))
        groups = tuple(map(_group_row, found[:_MOST_FINDINGS]))
        yield Table(f"findings{suffix}", "", columns, groups, tuple(notes))


def _group_row(group: rows.Group) -> Row:
    finding = group.first
    below = [Line(rows.sentence(finding.reason))]
    if finding.rule is not None:
        below.append(Line(f"rule {finding.rule}", Tone.QUIET))
    elif finding.cause is not None:
        below.append(Line("no rule holds for it", Tone.QUIET))
    if finding.advice is not None:
        below.append(Line(finding.advice))
    below += [Line(_consequence(reason, groups), Tone.QUIET) for reason, groups in group.consequences]
    return row(Cell(group.subject, tone=Tone.STRONG), ", ".join(group.figures), below=tuple(below))


def _consequence(reason: str, groups: Sequence[rows.Group]) -> str:
    names = ", ".join(group.subject for group in groups[:_MOST_NAMES])
    more = f" and {len(groups) - _MOST_NAMES} more" if len(groups) > _MOST_NAMES else ""
    return f"└ What follows: {names}{more} ({reason})."
