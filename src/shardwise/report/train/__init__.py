"""A Training, drawn."""

from shardwise.core.training import Training
from shardwise.report.common.room import Room

_HERE = "shardwise.report.train"
ROOMS = (Room(Training, "train", "train", f"{_HERE}.tables:train_report", f"{_HERE}.html:train_html"),)
