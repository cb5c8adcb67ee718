"""An Export, drawn."""

from shardwise.core.export import Export
from shardwise.report.common.room import Room

_HERE = "shardwise.report.export"
ROOMS = (Room(Export, "export", "export", f"{_HERE}.tables:export_report", f"{_HERE}.tables:export_html"),)
