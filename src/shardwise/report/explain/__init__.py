"""An Explanation or a Contrast, drawn."""

from shardwise.core.explanation import Contrast, Explanation
from shardwise.report.common.room import Room

_HERE = "shardwise.report.explain"
ROOMS = (
    Room(
        Explanation,
        "explain",
        "explanation",
        f"{_HERE}.tables:explanation_report",
        f"{_HERE}.html:explanation_html",
    ),
    Room(
        Contrast, "explain", "explanation", f"{_HERE}.tables:contrast_report", f"{_HERE}.html:contrast_html"
    ),
)
