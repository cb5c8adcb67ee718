"""VerificationRun -> tables for a terminal. Names come from models and plans: they are text, never markup."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shardwise.core.verification import Verdict, Verification, VerificationRun
from shardwise.report.compare.terminal import plain
from shardwise.report.verify import rows

_STYLE = {
    Verdict.RIGHT: "green",
    Verdict.WRONG: "bold red",
    Verdict.NEARLY_NOTHING: "yellow",
    Verdict.CRASHES: "bold red",
    Verdict.SUSPECTED: "bold red",
    Verdict.NOT_PROVED: "yellow",
    Verdict.SKIPPED: "dim",
}
_MOST_FINDINGS = 12


def render_verification(run: VerificationRun, console: Console) -> None:
    """One case in full; of several a table, then those in full that aren't right."""
    cases = run.verifications
    if len(cases) == 1:
        _render_one(cases[0], run, console)
        return
    console.print(Text(f"{rows.totals(run)}: {rows.settings(run)}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, justify in (
        ("Model", "left"),
        ("Plan", "left"),
        ("Verdict", "left"),
        ("Sharded", "right"),
        ("Largest error", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for each in cases:
        found = rows.row(each)
        verdict = Text(str(found.verdict), _STYLE[found.verdict])
        table.add_row(plain(found.model), plain(found.plan), verdict, found.sharded, found.error)
    console.print(table)
    for each in cases:
        if each.verdict in (Verdict.WRONG, Verdict.SUSPECTED):
            console.print()
            _render_one(each, run, console)
        elif each.verdict is not Verdict.RIGHT and rows.headline(each):
            what = Text.assemble(
                (f"{plain(each.model)} under {plain(each.plan)} ", "bold"),
                (str(each.verdict), _STYLE[each.verdict]),
            )
            console.print(Text.assemble(what, f": {plain(rows.headline(each))}"), soft_wrap=True)


def _render_one(each: Verification, run: VerificationRun, console: Console) -> None:
    title = f"{plain(each.model)} under {plain(each.plan)}"
    console.print(
        Panel(
            Text(plain(rows.verdict_text(each)), _STYLE[each.verdict]),
            box=box.ROUNDED,
            title=title,
            title_align="left",
        )
    )
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (*rows.facts(each), ("run", rows.settings(run))):
        table.add_row(name, plain(value))
    console.print(table)
    own, passed_on = rows.split(each)
    for group in own[:_MOST_FINDINGS]:
        _render_group(group, console)
    if len(own) > _MOST_FINDINGS:
        console.print(
            f"\n... and {len(own) - _MOST_FINDINGS} more: --json or --out has them all.", style="dim"
        )
    if passed_on:
        names = ", ".join(plain(group.subject) for group in passed_on[:4])
        more = f" and {len(passed_on) - 4} more" if len(passed_on) > 4 else ""
        console.print(
            Text(f"\nWhat follows from that: {names}{more} ({plain(passed_on[0].first.reason)})."),
            style="dim",
            soft_wrap=True,
        )


def _render_group(group: rows.Group, console: Console) -> None:
    finding = group.first
    console.print(
        Text.assemble("\n", (plain(group.subject), "bold"), "  ", ", ".join(group.figures)), soft_wrap=True
    )
    console.print(Text(f"  {plain(rows.sentence(finding.reason))}"), soft_wrap=True)
    if finding.rule is not None:
        console.print(Text(f"  rule {plain(str(finding.rule))}", "dim"), soft_wrap=True)
    elif finding.cause is not None:
        console.print(Text("  no rule holds for it", "dim"), soft_wrap=True)
    if finding.advice is not None:
        console.print(Text(f"  {plain(finding.advice)}"), soft_wrap=True)
