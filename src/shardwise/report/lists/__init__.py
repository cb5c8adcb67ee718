"""What there is to choose from, as tables: models, plans, machines, and a machine's constants."""

from shardwise.core.sample import Calibration
from shardwise.report.common.room import Room

_HERE = "shardwise.report.lists.tables"
ROOMS = (
    Room(Calibration, "calibrate", "calibration", f"{_HERE}:calibration_report", f"{_HERE}:calibration_html"),
)
