"""A VerificationRun, drawn."""

from shardwise.core.verification import VerificationRun
from shardwise.report.common.room import Room

_HERE = "shardwise.report.verify"
ROOMS = (
    Room(
        VerificationRun,
        "verify",
        "verification",
        f"{_HERE}.tables:verification_report",
        f"{_HERE}.html:verification_html",
    ),
)
