"""A RunProfile or a Difference, drawn."""

from shardwise.core.difference import Difference, RunProfile
from shardwise.report.common.room import Room

_HERE = "shardwise.report.diff"
ROOMS = (
    Room(RunProfile, "diff", "diff", f"{_HERE}.tables:run_report", f"{_HERE}.html:run_html"),
    Room(Difference, "diff", "diff", f"{_HERE}.tables:difference_report", f"{_HERE}.html:difference_html"),
)
