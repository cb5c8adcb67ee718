"""VerificationRun -> one HTML page: the cases in a table, then each that isn't plainly right in full."""

from shardwise.core.verification import Verdict, VerificationRun
from shardwise.report.common.page import draw
from shardwise.report.verify import rows, tables


def verification_html(run: VerificationRun) -> str:
    cases = run.verifications
    shown = [
        (number, each)
        for number, each in enumerate(cases)
        if len(cases) == 1 or each.verdict is not Verdict.SKIPPED
    ]
    return draw(
        "verify/verify.html.j2",
        ("verify/verify.css",),
        run=run,
        rows=rows,
        badge=tables.badge,
        cases=tables.cases_table(cases),
        shown=shown,
    )
