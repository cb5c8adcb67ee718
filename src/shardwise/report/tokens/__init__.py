"""What `shardwise tokens` wrote or checked, in words."""

from shardwise.core.token_folder import TokenFolder
from shardwise.report.common.room import Room

_HERE = "shardwise.report.tokens.tables"
ROOMS = (Room(TokenFolder, "tokens", "tokens", f"{_HERE}:tokens_report", f"{_HERE}:tokens_html"),)
