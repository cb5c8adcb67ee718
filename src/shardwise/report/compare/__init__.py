"""A Comparison, drawn."""

from shardwise.core.measurement import Comparison
from shardwise.report.common.room import Room

_HERE = "shardwise.report.compare"
ROOMS = (
    Room(
        Comparison,
        "report",
        "comparison",
        f"{_HERE}.tables:comparison_report",
        f"{_HERE}.html:comparison_html",
    ),
)
