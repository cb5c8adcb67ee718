"""A RunProfile, a Difference or a Beside, drawn."""

from shardwise.core.beside import Beside
from shardwise.core.difference import Difference, RunProfile
from shardwise.report.common.room import Room

_HERE = "shardwise.report.diff"
ROOMS = (
    Room(RunProfile, "diff", "diff", f"{_HERE}.tables:run_report", f"{_HERE}.html:run_html"),
    Room(Difference, "diff", "diff", f"{_HERE}.tables:difference_report", f"{_HERE}.html:difference_html"),
    Room(Beside, "diff", "diff", f"{_HERE}.beside_tables:beside_report", f"{_HERE}.beside_html:beside_html"),
)
