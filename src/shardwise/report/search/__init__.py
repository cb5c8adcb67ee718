"""A Search, drawn: the best plan of a model on a machine, what comes near it, and what decides."""

from shardwise.core.search import Search
from shardwise.report.common.room import Room

_HERE = "shardwise.report.search"
ROOMS = (Room(Search, "search", "search", f"{_HERE}.tables:search_report", f"{_HERE}.html:search_html"),)
