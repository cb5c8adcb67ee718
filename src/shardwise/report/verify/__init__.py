"""A VerificationRun, drawn."""

from shardwise.core.verification import VerificationRun
from shardwise.report.common.room import Room
from shardwise.report.common.table import Report


def _report(run: VerificationRun) -> Report:
    from shardwise.report.verify.tables import verification_report

    return verification_report(run)


def _page(run: VerificationRun) -> str:
    from shardwise.report.verify.html import verification_html

    return verification_html(run)


ROOMS = (Room(VerificationRun, "verify", "verification", _report, _page),)
