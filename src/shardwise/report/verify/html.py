"""VerificationRun -> one HTML file that needs no network; the rules of report/page.py hold."""

from markupsafe import Markup

from shardwise.core.verification import Verdict, VerificationRun
from shardwise.report.common.page import csp_hash, page_environment, template_source
from shardwise.report.compare.terminal import plain
from shardwise.report.verify import rows


def verification_html(run: VerificationRun) -> str:
    """The page: the cases in a table, then each that isn't plainly right in full."""
    environment = page_environment()
    environment.globals.update(rows=rows, plain=plain)
    script = template_source(environment, "explain/explain.js")
    css = "".join(
        template_source(environment, name)
        for name in ("compare/comparison.css", "explain/explain.css", "verify/verify.css")
    )
    cases = run.verifications
    return environment.get_template("verify/verify.html.j2").render(
        run=run,
        table=[rows.row(each) for each in cases],
        shown=[
            (number, each)
            for number, each in enumerate(cases)
            if len(cases) == 1 or each.verdict is not Verdict.SKIPPED
        ],
        css=Markup(css),
        script=Markup(script),
        script_hash=Markup(csp_hash(script)),
    )
